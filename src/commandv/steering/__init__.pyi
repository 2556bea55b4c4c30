from .carrying import carry_directions as carry_directions, carry_probes as carry_probes
from .contrast import Contrast as Contrast, load_contrast as load_contrast
from .making import (
    APPLICATIONS as APPLICATIONS,
    clamp as clamp,
    directions as directions,
    from_directions as from_directions,
    mean_ablation_along as mean_ablation_along,
    probes as probes,
    steer as steer,
)
from .methods import METHODS as METHODS, Method as Method, Probe as Probe, auc as auc, fit_probe as fit_probe
from .reading import (
    Reading as Reading,
    Stream as Stream,
    mean_states as mean_states,
    profile_stream as profile_stream,
    prompt_states as prompt_states,
    read_contrast as read_contrast,
    states as states,
)
