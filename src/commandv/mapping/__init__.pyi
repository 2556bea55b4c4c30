from .mappers import (
    MAPPED as MAPPED,
    MEAN_ABLATION as MEAN_ABLATION,
    ROTATED as ROTATED,
    SHUFFLED as SHUFFLED,
    Mapper as Mapper,
    fit_mapper as fit_mapper,
    layer_pair as layer_pair,
    mapper_arms as mapper_arms,
    unseen as unseen,
)
from .replacing import (
    Along as Along,
    Counterparts as Counterparts,
    pairing as pairing,
    read_counterparts as read_counterparts,
    replaced as replaced,
)
from .tokens import Pairing as Pairing, pair_tokens as pair_tokens
