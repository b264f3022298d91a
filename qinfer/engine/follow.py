"""What ranks other than 0 do: load their share of the model, then repeat what rank 0 does until it closes the model."""

from __future__ import annotations

from typing import Any

from qinfer.engine.generator import Generator
from qinfer.errors import GroupError
from qinfer.models.model import Model
from qinfer.parallel.comm import Group


def run(group: Group, **options: Any) -> None:  # noqa: ANN401  whatever rank 0 gave to Model.load
    """Load a model as a rank that rank 0 has started, and follow."""
    follow(Model.load(**options, parallel=group), group)


def follow(model: Model, group: Group) -> None:
    """Repeat what rank 0 does with its share of the model, until rank 0 closes it.

    Raises:
        GroupError: a rank is gone.
    """
    try:
        _repeat(model, group)
    except GroupError:
        # Rank 0 has all it needs of a step before this rank is through with it.
        if not group.is_closed:
            raise


def _repeat(model: Model, group: Group) -> None:
    generators: dict[int, Generator] = {}
    while (message := group.receive()) is not None:
        for number in message.get("released", ()):
            generators.pop(number, None)
        if "layers" in message:
            model.hidden_states(message["token_ids"], message["layers"], lora=model.find_lora(message["lora"]))
        elif "token_ids" in message:
            model.logits(message["token_ids"], lora=model.find_lora(message["lora"]))
        elif "load_lora" in message:
            model.load_lora(**message["load_lora"])
        elif "unload_lora" in message:
            model.forget_lora(message["unload_lora"])
        elif "settings" in message:
            generators[message["generator"]] = Generator(model, **message["settings"])
        elif "warm_up" in message:
            generators[message["generator"]].warm_up()
        else:
            generators[message["generator"]].repeat(message["requests"], message["cancelled"])
