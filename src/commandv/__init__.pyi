"""The public names, and nothing else."""

from .adapters.adapter import (
    Adapter as Adapter,
    Intervention as Intervention,
)
from .adapters.attach import attach as attach
from .adapters.carried import Carried as Carried
from .adapters.edit import Edit as Edit
from .adapters.kinds import (
    ablation as ablation,
    consreft as consreft,
    direft as direft,
    lobireft as lobireft,
    loreft as loreft,
    nodireft as nodireft,
    noreft as noreft,
    steering_vector as steering_vector,
)
from .adapters.network import Network as Network
from .adapters.store import save as save
from .errors import CommandVError as CommandVError
from .evaluation.forecast import Forecast as Forecast, predict as predict
from .evaluation.outcomes import measure as measure
from .evaluation.price import drift as drift
from .evaluation.scores import Score as Score
from .evaluation.tasks import Task as Task
from .evaluation.transferring.certificate import Transferred as Transferred
from .evaluation.transferring.job import TransferSettings as TransferSettings
from .evaluation.transferring.running import transfer_adapter as transfer_adapter
from .evaluation.tuning import choose_layer as choose_layer
from .executors.executor import Local as Local
from .executors.ray import Ray as Ray
from .interop.load import load_adapter as load_adapter
from .interop.share import pull as pull, push as push
from .models.encoding import encode as encode
from .models.generation import generate as generate
from .models.layers import (
    all_layers as all_layers,
    every_other as every_other,
    last_half as last_half,
    last_third as last_third,
    middle_third as middle_third,
)
from .models.live import attached as attached, detach_all as detach_all
from .models.lm import LM as LM
from .models.load import load_model as load_model, wrap_like as wrap_like, wrap_model as wrap_model
from .positions import Positions as Positions
from .profiles.profile import (
    Profile as Profile,
    load_profile as load_profile,
    save_profile as save_profile,
)
from .profiles.profiling import profile as profile, profile_on as profile_on
from .prompts.sets import (
    Prompt as Prompt,
    PromptSet as PromptSet,
    load_prompts as load_prompts,
    mixed_forms as mixed_forms,
)
from .steering import (
    Contrast as Contrast,
    Probe as Probe,
    auc as auc,
    carry_directions as carry_directions,
    carry_probes as carry_probes,
    clamp as clamp,
    directions as directions,
    from_directions as from_directions,
    load_contrast as load_contrast,
    mean_ablation_along as mean_ablation_along,
    probes as probes,
    prompt_states as prompt_states,
    steer as steer,
)
from .training.train import (
    ConsReFT as ConsReFT,
    DiReFT as DiReFT,
    LobiReFT as LobiReFT,
    LoReFT as LoReFT,
    NodiReFT as NodiReFT,
    NoReFT as NoReFT,
    TrainSettings as TrainSettings,
    train as train,
)
from .transfer.convert.autoencoder import Autoencoder as Autoencoder
from .transfer.convert.fitters import (
    Affine as Affine,
    Pinv as Pinv,
    Procrustes as Procrustes,
    ReducedRank as ReducedRank,
    Ridge as Ridge,
)
from .transfer.convert.fourier import FourierRidge as FourierRidge
from .transfer.convert.linear import AffineMap as AffineMap, Dense as Dense
from .transfer.distil.context import Context as Context
from .transfer.distil.demonstrate import demonstrate as demonstrate
from .transfer.distil.demonstrations import (
    Demonstrations as Demonstrations,
    load_demonstrations as load_demonstrations,
    save_demonstrations as save_demonstrations,
)
from .transfer.distil.distil import distil as distil
from .transfer.distil.vocabulary import Answers as Answers, Vocabulary as Vocabulary
from .transfer.fidelity import Fidelity as Fidelity
from .transfer.link import Link as Link, link as link
from .transfer.match import (
    LayerPair as LayerPair,
    explicit as explicit,
    lowest_error as lowest_error,
    nearest as nearest,
    proportional as proportional,
)
from .transfer.paste import paste as paste, published as published, random_like as random_like
