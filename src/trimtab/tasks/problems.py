"""The self-contained problems of intrinsic dimension by name. Imports no torch until one is made."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from trimtab.tasks.problem import Problem

PROBLEMS: dict[str, str] = {
    "toy": "1000 parameters in 10 groups, group i to sum to i: dimension 10 by construction; seconds, no data",
    "digits": "8×8 digits that scikit-learn carries, a net 64-32-10: a first try, no download",
    "mnist-fc": "MNIST, a fully connected net 784-200-200-10; width and depth can be chosen, pixels or labels shuffled",
    "mnist-lenet": "MNIST, LeNet: two convolutions and three layers; pixels or labels can be shuffled",
}
"""What there is, and in a line what it is."""


def make_problem(name: str, data_dir: Path | None = None, **options: Any) -> Problem:
    """The problem `name` of PROBLEMS.

    data_dir: the folder with MNIST's files, by default the one that TRIMTAB_DATA names; or a dataset of the hub's, as
    `tasks.idx.mnist_folder` takes it. options: the keyword arguments of the problem's function in `tasks.vision` or
    `tasks.toy`.
    Raises UsageError for a name, an option or data there are not, FormatError for a broken file.
    """
    if name not in PROBLEMS:
        hint = did_you_mean(name, PROBLEMS)
        raise UsageError(
            f"there is no problem {name!r}{hint or ';'} there are {', '.join(PROBLEMS)}, and "
            "sentences for a pretrained model (--model)"
        )
    from trimtab.tasks import toy, vision

    makers = {
        "toy": toy.toy,
        "digits": vision.digits,
        "mnist-fc": vision.mnist_fc,
        "mnist-lenet": vision.mnist_lenet,
    }
    known = [option for option in inspect.signature(makers[name]).parameters if option != "data_dir"]
    for option in options:
        if option not in known:
            takes = f"; it takes {', '.join(known)}" if known else "; it takes none"
            raise UsageError(f"{name} has no option {option!r}{did_you_mean(option, known)}{takes}")
    if name.startswith("mnist"):
        options["data_dir"] = data_dir
    elif data_dir is not None:
        raise UsageError(f"{name} reads no files, so --data-dir {data_dir} changes nothing: leave it out")
    made: Problem = makers[name](**options)
    return made
