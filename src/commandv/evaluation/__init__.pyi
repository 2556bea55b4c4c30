from .arithmetic import arithmetic_prompts as arithmetic_prompts
from .arms import ARMS as ARMS, METHODS as METHODS, Arm as Arm, Cost as Cost, Made as Made, make_arm as make_arm
from .catalogue import TASKS as TASKS, expecting as expecting, load_task as load_task, tasks_of as tasks_of
from .choices import Choices as Choices, multiple_choice as multiple_choice
from .endpoint import Endpoint as Endpoint, Usage as Usage
from .formats import (
    FORMATS as FORMATS,
    capitals as capitals,
    distinct_share as distinct_share,
    in_another_language as in_another_language,
    json_fields as json_fields,
    json_lenient as json_lenient,
    json_strict as json_strict,
    language as language,
    opens_with as opens_with,
    outside_script as outside_script,
    word_count as word_count,
)
from .graders import GRADERS as GRADERS, Grader as Grader, loops as loops
from .judges import JUDGES as JUDGES, Phrases as Phrases, load_judge as load_judge, refusal_phrases as refusal_phrases
from .judgments import Cached as Cached, CostlyJudge as CostlyJudge, Judgment as Judgment
from .likeness import Likeness as Likeness, like_the_donor as like_the_donor
from .material import DirectionMaterial as DirectionMaterial, Material as Material
from .meter import Measured as Measured, Meter as Meter, price_scores as price_scores
from .model_judges import Classifier as Classifier, Guard as Guard
from .outcomes import Outcome as Outcome, measure as measure, write_outcome as write_outcome
from .price import (
    drift as drift,
    drift_values as drift_values,
    perplexity as perplexity,
    perplexity_values as perplexity_values,
    prices as prices,
    reply_log_probs as reply_log_probs,
)
from .questions import Question as Question, as_letters as as_letters, load_questions as load_questions
from .reasoning import (
    Final as Final,
    final_answer as final_answer,
    is_right as is_right,
    reasons_first as reasons_first,
    words_before_answer as words_before_answer,
)
from .scores import Score as Score, mean as mean, pooled as pooled, rate as rate
from .statistics import (
    Comparison as Comparison,
    compare as compare,
    difference as difference,
    holm as holm,
    kappa as kappa,
    paired_p as paired_p,
    recovered_fraction as recovered_fraction,
)
from .tasks import (
    ByPrompt as ByPrompt,
    ByText as ByText,
    Judge as Judge,
    Split as Split,
    Task as Task,
    load_splits as load_splits,
)
from .tuning import (
    Choice as Choice,
    Setting as Setting,
    Tried as Tried,
    Tuned as Tuned,
    choose_layer as choose_layer,
    grid as grid,
    tune as tune,
)
