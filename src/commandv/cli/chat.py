"""The verb that talks: a model before and after, side by side."""

from __future__ import annotations

from commandv.cli.app import verb
from commandv.cli.checks import require_fits
from commandv.cli.options import Loading, MaxNewTokens, Model, Reading, SamplingSeed, Temperature, TopP
from commandv.cli.serve import Named, named_places


@verb
def chat(
    model: Model,
    how: Loading,
    reading: Reading,
    adapter: Named = None,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: SamplingSeed = 0,
    max_new_tokens: MaxNewTokens = 256,
) -> None:
    """Talk to a model without and with its behaviours, side by side; /help lists what can be changed meanwhile."""
    from commandv.errors import InputError

    places = named_places(adapter, reading, model)
    try:
        from commandv.cli.talking import talk
    except ImportError as error:
        raise InputError(
            f"chat needs a package that is missing ({error.name}): pip install 'commandv[chat]'"
        ) from error
    from commandv.models.sampling import Sampling
    from commandv.serving.engine import Engine
    from commandv.serving.talk import Talk

    sampling = Sampling(temperature, top_p, seed)
    adapters = {name: reading.load(place) for name, place in places.items()}
    require_fits(list(adapters.values()), model, 1.0)
    lm = how.load(model)
    with Engine(lm, adapters, max_rows=2) as engine:
        talk(Talk(engine, sampling=sampling, max_tokens=max_new_tokens))
