"""`evaluate`: scores against retrained models, against other scores, and against themselves (`docs/evaluation.md`)."""

from carv_attrib.evaluation.counterfactual import Counterfactuals, counterfactual
from carv_attrib.evaluation.ground_truth import GroundTruth, lds
from carv_attrib.evaluation.queries import Queries, agreement, check_same_examples, self_retrieval

__all__ = [
    "Counterfactuals",
    "GroundTruth",
    "Queries",
    "agreement",
    "check_same_examples",
    "counterfactual",
    "lds",
    "self_retrieval",
]
