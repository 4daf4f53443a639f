"""The client: takes the adapter, trains, gives the adapter back."""

from __future__ import annotations

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from peft import get_peft_model_state_dict, set_peft_model_state_dict

from tinylora.task import load_model, load_samples, train

app = ClientApp()


@app.train()
def fit(message: Message, context: Context) -> Message:
    """A client's round."""
    inputs = str(context.run_config["inputs"])
    model, samples = load_model(inputs), load_samples(inputs)
    set_peft_model_state_dict(model, message.content["arrays"].to_torch_state_dict())
    loss = train(model, samples, int(context.run_config["steps"]))
    content = {
        "arrays": ArrayRecord(get_peft_model_state_dict(model)),
        "metrics": MetricRecord({"loss": loss, "num-examples": len(samples)}),
    }
    return Message(RecordDict(content), reply_to=message)
