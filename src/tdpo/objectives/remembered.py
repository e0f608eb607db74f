"""The objective beside a saved model, so that evaluation and resumption know what the model was trained with."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tdpo.errors import UserError
from tdpo.objectives.base import Objective

logger = logging.getLogger("tdpo")
FILE = "objective.json"


@dataclass(frozen=True)
class ObjectiveFile:
    """Writes the objective of a run into the folders of its models, and compares it when the run is resumed.

    Attributes:
        objective: The objective.
        token_weights: Its weights by position, or None.
    """

    objective: Objective
    token_weights: str | None = None

    def content(self) -> dict[str, Any]:
        """Returns the objective by name, its parameters, and the weights by position."""
        name, parameters = self.objective.spelling(), dict(self.objective.parameters)
        return {"objective": name, "parameters": parameters, "token_weights": self.token_weights}

    def save(self, folder: str | Path) -> None:
        """Writes the file."""
        Path(folder, FILE).write_text(json.dumps(self.content(), indent=2) + "\n", encoding="utf-8")

    def load(self, folder: str | Path) -> None:
        """Warns if a checkpoint was trained with another objective."""
        path = Path(folder, FILE)
        if path.is_file() and (found := read_objective(path)) != self.content():
            logger.warning("%s was trained with %s; the run continues with %s", folder, found, self.content())


def read_objective(path: str | Path) -> dict[str, Any]:
    """Reads what :meth:`ObjectiveFile.save` wrote.

    Raises:
        UserError: for a file that is something else.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        name, parameters = str(content["objective"]), dict(content["parameters"])
        weights = content.get("token_weights")
        if not isinstance(weights, str | None):
            raise TypeError(f"token_weights {weights!r}")
        return {"objective": name, "parameters": parameters, "token_weights": weights}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not the objective of a model ({error}); give --objective") from error
