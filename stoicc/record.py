"""What was done to a layer before it became a kernel; travels with the kernel."""

from dataclasses import asdict, dataclass
from typing import Any

from stoicc.ir.errors import InputError


@dataclass(frozen=True)
class LayerRecord:
    """How a layer was compressed.

    Attributes:
        steps: operators with their options.
        error: ||X (W - W_c)^T|| / ||X W^T|| over the calibration inputs X that the layer saw when it
            was compressed, in Frobenius norms, bias excluded; None without calibration.
        seconds: for operators and compiling, calibration runs excluded.
        narrowed_from: the shape of the weight before width pruning took rows or columns out; None where none did.
        notes: what a reader should know: dead channels, warnings of operators, tied weights.
    """

    steps: tuple[str, ...] = ()
    error: float | None = None
    seconds: float = 0.0
    notes: tuple[str, ...] = ()
    narrowed_from: tuple[int, ...] | None = None

    @property
    def data(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)

    @staticmethod
    def of(data: Any) -> "LayerRecord":
        """The inverse of `data`; InputError for anything else."""
        try:
            error = None if data["error"] is None else float(data["error"])
            shape = None if data["narrowed_from"] is None else tuple(map(int, data["narrowed_from"]))
            return LayerRecord(tuple(data["steps"]), error, float(data["seconds"]), tuple(data["notes"]), shape)
        except (KeyError, TypeError, ValueError):
            raise InputError(
                "layer record: expected steps, error, seconds, notes and a shape, found something else"
            ) from None
