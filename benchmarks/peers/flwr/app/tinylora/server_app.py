"""The server: plain FedAvg over both clients."""

from __future__ import annotations

from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from peft import get_peft_model_state_dict

from tinylora.task import load_model

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """All rounds."""
    adapter = get_peft_model_state_dict(load_model(str(context.run_config["inputs"])))
    strategy = FedAvg(fraction_evaluate=0.0)
    strategy.start(grid=grid, initial_arrays=ArrayRecord(adapter), num_rounds=int(context.run_config["rounds"]))
