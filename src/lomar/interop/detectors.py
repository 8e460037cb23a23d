"""Detector files: safetensors with the plan that rebuilds the detector."""

from pathlib import Path

from lomar.detection.detector import Detector, DetectorPlan
from lomar.errors import UserError
from lomar.interop.weights import first_line, read_file, save_file

DETECTOR_FILE = "detector.safetensors"


def save_detector(path: Path, detector: Detector) -> None:
    """Write a detector with all that `load_detector` needs to rebuild it."""
    save_file(path, detector.state_dict(), "detector", {"plan": detector.plan.to_dict()})


def load_detector(path: str | Path) -> Detector:
    """The detector of a run of `lomar detect`, in evaluation mode, on the CPU.

    Args:
        path: the run's folder, or a detector's file.

    Raises:
        UserError: there is no such file, or it does not hold a detector.
    """
    file = Path(path)
    if file.is_dir():
        if not (file / DETECTOR_FILE).exists():
            raise UserError(f"{file} holds no {DETECTOR_FILE}; is it the folder of a run of lomar detect?")
        file = file / DETECTOR_FILE
    if not file.exists():
        raise UserError(f"there is no run or file {file}")
    metadata, tensors = read_file(file, "detector")
    try:
        detector = Detector(DetectorPlan.from_dict(metadata["plan"]))
        detector.load_state_dict(tensors)
    except Exception as error:  # damaged numbers lead anywhere
        raise UserError(f"{file} does not hold a whole detector ({first_line(error)})") from error
    return detector.eval()
