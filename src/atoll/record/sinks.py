"""Sinks: others who hear a run's events beside the record. A recipe names them under `sinks`; a user's own are
`module:factory`, where the factory gives a function from the run's folder to a sink."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from atoll.errors import AtollError
from atoll.record.events import Evaluated, Event, Replied, RoundEnded, Sink


def tensorboard(folder: str = "tensorboard") -> Callable[[Path], Sink]:
    """Losses, bytes and seconds as TensorBoard scalars, in `folder` inside the run's folder.

    Raises:
        AtollError: TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise AtollError(
            "TensorBoard is not installed", where="sinks", found=error, remedy="pip install 'atoll[tensorboard]'"
        ) from error

    def open_at(run: Path) -> Sink:
        writer = SummaryWriter(str(run / folder))

        def sink(event: Event) -> None:
            for name, (value, step) in scalars(event).items():
                writer.add_scalar(name, value, step)
            writer.flush()

        return sink

    return open_at


def scalars(event: Event) -> dict[str, tuple[float, int]]:
    """The numbers of an event that make curves: name -> (value, round).

    >>> scalars(Evaluated(2, True, {"clinic": {"loss": 0.5}}, 0.5, 0.5, 1.0))["held_out_loss/clinic"]
    (0.5, 2)
    """
    match event:
        case Evaluated():
            each = {f"held_out_loss/{name}": (m["loss"], event.round) for name, m in event.clients.items()}
            return {"held_out_loss/mean": (event.mean, event.round), **each}
        case Replied():
            return {f"local_loss/{event.client}": (event.loss, event.round + 1)}
        case RoundEnded():
            named = {name: getattr(event, name) for name in ("loss", "bytes_down", "bytes_up", "seconds", "accepted")}
            return {f"round/{name}": (float(value), event.round + 1) for name, value in named.items()}
        case _:
            return {}
