"""Whether an engine with a folder's weights computes what transformers computes from that folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from forgetrain.errors import UserError
from forgetrain.publish.parity import TOLERANCE, folder_parity
from forgetrain.spec.target import Target
from forgetrain.train.initial import FolderWeights
from forgetrain.train.verified import ChosenEngine


def check_initial(target: Target, initial: FolderWeights, chosen: ChosenEngine) -> dict[str, Any]:
    """The figures of the comparison, for run.json. Raises UserError when logits differ by more than rounding."""
    engine = None if chosen.sha256 is None or target.hardware.device != "cpu" else Path(chosen.name)
    parity = folder_parity(initial.folder, target, dict(initial), engine)
    if not parity.passed:
        raise UserError(
            f"logits of transformers and of the engine ({parity.engine}) with these weights differ by "
            f"{parity.max_difference:.2e}, more than {TOLERANCE:g} of the largest, {parity.largest:.3g}",
            file=initial.folder,
            remedy="compare the folder's config.json with the target's model section",
        )
    return {
        "max_difference": parity.max_difference,
        "largest": parity.largest,
        "relative": parity.max_difference / parity.largest,
        "tolerance": TOLERANCE,
        "engine": parity.engine,
    }
