"""What the driver makes of a request's parameters before anything is sent."""

import pytest

from ssd_ray.config import SamplingParams
from ssd_ray.errors import RequestError
from tests.support.engines import checked
from tests.support.tokenizers import BYTES, END


@pytest.fixture(scope="module")
def models():
    return checked(BYTES, 257, 64)


def test_bad_words_become_tokens_with_and_without_a_space_before_them(models):
    a, b, space = (BYTES.encode(text)[0] for text in "ab ")
    params = models.params(SamplingParams(bad_words=["a", " ab", "<end>", " "], bad_words_ids=[[7]]))
    assert params.bad_words == ()
    assert params.bad_words_ids == (
        (7,),
        (a,),
        (space, a),
        (a, b),
        (space, a, b),
        (END,),
        (space, END),
        (space,),
        (space, space),
    )


def test_parameters_without_bad_words_are_left_as_they_are(models):
    params = SamplingParams(bad_words_ids=[[7]], logit_bias={256: 1.0})
    assert models.params(params) is params


@pytest.mark.parametrize(("field", "value"), [("logit_bias", {257: 1.0}), ("bad_words_ids", [[1], [2, 257]])])
def test_tokens_that_the_model_does_not_know_are_refused(models, field, value):
    with pytest.raises(RequestError, match=f"{field}: expected token ids from 0 to 256, got 257"):
        models.params(SamplingParams(**{field: value}))
