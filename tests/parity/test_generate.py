"""Batches against one row at a time, and both against plain forward passes, in float32 on a tiny random model."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from thriftune.errors import DoesNotFitError, InputError, ModelError
from thriftune.infer.batching import Progress
from thriftune.infer.choices import score_choices
from thriftune.infer.classify import classify, reads_prompts_once
from thriftune.infer.generate import generate, pick
from thriftune.recipe import GenerationRecipe

PAD = 0
VOCABULARY = 300
POSITIONS = 96


def tiny_model(family: str = "llama") -> torch.nn.Module:
    """Positions are relative in llama and absolute in gpt2; a wrong count of padded positions shows in the second."""
    torch.manual_seed(0)
    if family == "gpt2":
        config = GPT2Config(
            vocab_size=VOCABULARY, n_positions=POSITIONS, n_embd=64, n_layer=2, n_head=4, initializer_range=0.3
        )
        return GPT2LMHeadModel(config).eval()
    llama = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=POSITIONS,
        initializer_range=0.15,
    )
    return LlamaForCausalLM(llama).eval()


def limit_memory(model: torch.nn.Module, rows_that_fit: int) -> torch.utils.hooks.RemovableHandle:
    """The model runs out of memory above `rows_that_fit` rows, as on a device."""

    def check(module, inputs):
        if inputs[0].shape[0] > rows_that_fit:
            raise torch.OutOfMemoryError("CUDA out of memory (test)")

    return model.get_input_embeddings().register_forward_pre_hook(check)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def model(request) -> torch.nn.Module:
    return tiny_model(request.param)


@pytest.fixture
def prompts() -> list[list[int]]:
    draw = torch.Generator().manual_seed(1)
    lengths = [5, 31, 1, 17, 17, 40, 3, 64, 8, 2, 23]
    return [torch.randint(1, VOCABULARY, (length,), generator=draw).tolist() for length in lengths]


def settings(**changes) -> GenerationRecipe:
    return GenerationRecipe(**{"max_new_tokens": 12, "batch_size": 4, **changes})


def ignore(progress: Progress) -> None:
    pass


def ask(model, prompts, recipe, stop=(), seed=7, on_progress=ignore):
    return generate(model, prompts, recipe, list(stop), PAD, seed=seed, on_progress=on_progress)


def plain_greedy(model, prompt: list[int], tokens: int, stop: tuple[int, ...]) -> list[int]:
    """No cache, no padding, no batch: the definition."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(tokens):
            token = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
            if token in stop:
                break
            ids.append(token)
    return ids[len(prompt) :]


def test_a_batch_answers_as_one_row_at_a_time_does_by_plain_forward_passes(model, prompts):
    expected = [plain_greedy(model, prompt, 12, ()) for prompt in prompts]
    assert len({tuple(answer) for answer in expected}) > 5, "the test needs a model whose answers differ"
    for batch_size in (1, 3, 4, 32):
        assert ask(model, prompts, settings(batch_size=batch_size)) == expected


def test_answers_come_in_the_order_of_the_prompts(model, prompts):
    forward = ask(model, prompts, settings())
    assert ask(model, prompts[::-1], settings()) == forward[::-1]


def test_every_stop_token_ends_an_answer_and_is_left_out(model, prompts):
    free = ask(model, prompts, settings())
    stop = (free[0][4], free[3][2])
    answers = ask(model, prompts, settings(), stop=stop)
    assert answers == [plain_greedy(model, prompt, 12, stop) for prompt in prompts]
    assert len(answers[0]) <= 4 and len(answers[3]) <= 2
    assert not any(token in answer for token in stop for answer in answers)


def test_the_pad_token_may_be_a_stop_token(model, prompts):
    stop = (ask(model, prompts, settings())[1][3],)
    padded_with_stop = generate(model, prompts, settings(), stop, stop[0], seed=0, on_progress=ignore)
    assert padded_with_stop == ask(model, prompts, settings(), stop=stop)


def test_a_models_own_generation_defaults_have_no_say_and_come_back(model, prompts):
    expected = ask(model, prompts, settings())
    odd = copy.deepcopy(model)
    odd.generation_config = GenerationConfig(
        do_sample=True,
        temperature=3.0,
        top_k=3,
        max_length=5,
        repetition_penalty=5.0,
        no_repeat_ngram_size=1,
        suppress_tokens=[answer[0] for answer in expected],
        forced_eos_token_id=9,
        eos_token_id=expected[0][1],
    )
    before = odd.generation_config.to_dict()
    assert ask(odd, prompts, settings()) == expected
    assert odd.generation_config.to_dict() == before


def test_a_peft_model_generates_and_keeps_its_configuration(model, prompts):
    adapted = get_peft_model(
        copy.deepcopy(model), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    )
    adapted.base_model.model.generation_config = GenerationConfig(do_sample=True, max_length=7)
    answers = ask(adapted, prompts, settings())
    assert answers == [plain_greedy(adapted.eval(), prompt, 12, ()) for prompt in prompts]
    assert answers != ask(model, prompts, settings())
    assert adapted.generation_config.max_length == 7 and adapted.base_model.model.generation_config.do_sample
    choices = [[5], [6, 7]]
    scores = score_choices(adapted, prompts, choices, 4, PAD, ignore)
    assert torch.allclose(scores, plain_scores(adapted, prompts, choices), atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_restored_module_by_module_also_after_an_error(prompts, training):
    model = tiny_model().train(training)
    model.model.layers[0].train(not training)
    before = [module.training for module in model.modules()]
    ask(model, prompts[:2], settings())
    score_choices(model, prompts[:2], [[5], [6]], 4, PAD, ignore)
    limit = limit_memory(model, 0)
    with pytest.raises(DoesNotFitError):
        ask(model, prompts[:1], settings())
    limit.remove()
    assert [module.training for module in model.modules()] == before
    loss = model(input_ids=torch.tensor([prompts[0]]), labels=torch.tensor([prompts[0]])).loss
    loss.backward()
    assert model.lm_head.weight.grad is not None


def test_sampling_depends_on_seed_and_row_and_not_on_the_batch(model, prompts):
    warm = settings(temperature=1.0, top_p=0.9)
    first = ask(model, prompts, warm, seed=3)
    assert ask(model, prompts, warm, seed=3) == first
    assert ask(model, prompts, settings(temperature=1.0, top_p=0.9, batch_size=1), seed=3) == first
    assert ask(model, prompts, warm, seed=4) != first
    same = ask(model, [prompts[0]] * 4, warm, seed=3)
    assert len({tuple(answer) for answer in same}) == 4, "the same prompt twice is two draws"


def test_sampling_leaves_the_global_random_state_alone(model, prompts):
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    ask(model, prompts[:2], settings(temperature=1.0))
    assert torch.equal(torch.rand(3), expected)


def test_picked_tokens_have_the_asked_frequencies():
    logits_BV = torch.tensor([0.5, 0.2, 0.2, 0.1]).log().expand(4000, 4)
    uniform_B1 = ((torch.arange(4000) + 0.5) / 4000).double().unsqueeze(1)

    def counts(temperature, top_p):
        return torch.bincount(pick(logits_BV, uniform_B1, temperature, top_p).squeeze(1), minlength=4).tolist()

    assert counts(1.0, 1.0) == pytest.approx([2000, 800, 800, 400], abs=1)
    assert counts(1.0, 0.65) == pytest.approx([4000 * 5 / 7, 4000 * 2 / 7, 0, 0], abs=1)
    assert counts(1.0, 0.4) == [4000, 0, 0, 0]
    squares = torch.tensor([0.25, 0.04, 0.04, 0.01]) / 0.34
    assert counts(0.5, 1.0) == pytest.approx((4000 * squares).tolist(), abs=1)


def test_picking_at_the_ends_of_the_uniform_gives_possible_tokens():
    logits_BV = torch.tensor([[0.0, float("-inf"), 1.0, float("-inf")]]).expand(2, 4)
    uniform_B1 = torch.tensor([[0.0], [1.0 - 2**-53]], dtype=torch.float64)
    assert pick(logits_BV, uniform_B1, 1.0, 1.0).squeeze(1).tolist() == [2, 0]


def test_out_of_memory_halves_the_batch_says_so_and_changes_no_answer(prompts):
    model = tiny_model()
    expected = ask(model, prompts, settings(batch_size=8)), score_choices(model, prompts, [[5], [6]], 8, PAD, ignore)
    sampled = ask(model, prompts, settings(batch_size=8, temperature=1.0))
    limit_memory(model, 2)
    seen: list[Progress] = []
    assert ask(model, prompts, settings(batch_size=8), on_progress=seen.append) == expected[0]
    assert [step.event for step in seen if step.event] == [
        "out of memory with 8 rows at once; went on with 4",
        "out of memory with 4 rows at once; went on with 2",
    ]
    assert seen[-1] == Progress(11, 11, None)
    assert ask(model, prompts, settings(batch_size=8, temperature=1.0)) == sampled
    assert torch.allclose(score_choices(model, prompts, [[5], [6]], 8, PAD, ignore), expected[1], atol=1e-5)


def test_a_row_that_does_not_fit_alone_is_an_error_that_says_its_length(prompts):
    model = tiny_model()
    limit_memory(model, 0)
    with pytest.raises(DoesNotFitError, match="single row of 64 tokens"):
        ask(model, prompts, settings())


def test_an_error_that_is_not_about_memory_is_not_swallowed(model):
    with pytest.raises((IndexError, RuntimeError), match="index out of range"):
        ask(model, [[VOCABULARY + 5]], settings())


def test_prompts_too_long_or_empty_are_refused_with_their_number(model):
    with pytest.raises(InputError, match=r"prompt 2 has 85 tokens .* 96 positions, of which 12"):
        ask(model, [[5] * 84, [5] * 85], settings())
    assert len(ask(model, [[5] * 84], settings())[0]) == 12
    with pytest.raises(InputError, match="prompt 1 has no token"):
        ask(model, [[]], settings())
    with pytest.raises(InputError, match="prompt 1 has 96 tokens"):
        score_choices(model, [[5] * 96], [[5]], 4, PAD, ignore)


def test_no_prompts_no_answers(model):
    assert ask(model, [], settings()) == []
    assert score_choices(model, [], [[5], [6]], 4, PAD, ignore).shape == (0, 2)


def plain_scores(model, prompts, choices) -> torch.Tensor:
    """The definition: one sequence at a time, no padding, the whole logits."""
    rows = []
    with torch.no_grad():
        for prompt in prompts:
            row = []
            for choice in choices:
                log_chances = model(input_ids=torch.tensor([prompt + choice])).logits[0].log_softmax(-1)
                row.append(sum(float(log_chances[len(prompt) - 1 + i, token]) for i, token in enumerate(choice)))
            rows.append(row)
    return torch.tensor(rows)


@pytest.mark.parametrize(
    "choices", [[[5], [6]], [[5], [6], [299]], [[5, 6], [7, 8]], [[5], [6, 7, 8], [9, 9]], [[5, 6], [5, 7]]]
)
@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_choice_scores_are_those_of_one_sequence_at_a_time(model, prompts, choices, batch_size):
    scores = score_choices(model, prompts, choices, batch_size, PAD, ignore)
    assert scores.dtype == torch.float32 and scores.shape == (len(prompts), len(choices))
    assert torch.allclose(scores, plain_scores(model, prompts, choices), atol=1e-5, rtol=0)


def test_single_token_choices_cost_one_pass_and_one_position(prompts):
    model = tiny_model()
    calls = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: calls.append(tuple(output.shape)))
    score_choices(model, prompts, [[5], [6], [7]], 32, PAD, ignore)
    assert calls == [(11, 1, VOCABULARY)]


def test_empty_choices_are_refused_and_nan_is_an_error(prompts):
    model = tiny_model()
    for choices in ([], [[5], []]):
        with pytest.raises(InputError, match="choices of"):
            score_choices(model, prompts, choices, 4, PAD, ignore)
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    with pytest.raises(ModelError, match="prompt 1 is not a number"):
        score_choices(model, prompts, [[5], [6]], 4, PAD, ignore)


def test_choices_have_chances_that_sum_to_one_over_the_vocabulary(model, prompts):
    scores = score_choices(model, prompts[:3], [[token] for token in range(VOCABULARY)], 4, PAD, ignore)
    assert torch.allclose(scores.exp().sum(-1), torch.ones(3), atol=1e-5)


def test_the_longest_prompts_go_first_and_every_token_goes_through_the_model_once(prompts):
    model = tiny_model()
    shapes = []
    model.get_input_embeddings().register_forward_pre_hook(lambda module, inputs: shapes.append(inputs[0].shape))
    ask(model, prompts, settings())
    first_passes = [shape for shape in shapes if shape[1] > 1 or len(shapes) == 1]
    assert first_passes == [(4, 64), (4, 17), (3, 3)], "batches of 4 by length: 64 40 31 23, 17 17 8 5, 3 2 1"
    assert len(shapes) == 3 * 12 and {shape[1] for shape in shapes} == {64, 17, 3, 1}, "a cache keeps what was read"


# -------------------------------------------------------------------------------------- likelihoods and answers at once

CHOICES = [[5], [6, 7, 8], [9, 9]]


def both(model, prompts, choices=CHOICES, stop=(), seed=7, on_progress=ignore, **changes):
    return classify(model, prompts, choices, settings(**changes), list(stop), PAD, seed=seed, on_progress=on_progress)


def sliding_model() -> torch.nn.Module:
    """Attention to the last 8 positions only, whose cache forgets the others."""
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=POSITIONS,
        initializer_range=0.15,
        sliding_window=8,
    )
    return MistralForCausalLM(config).eval()


@pytest.mark.parametrize("choices", [[[5], [6]], CHOICES, [[5, 6], [5, 7]]])
@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_reading_a_prompt_once_gives_the_scores_and_answers_of_reading_it_every_time(
    model, prompts, choices, batch_size
):
    stop = (ask(model, prompts, settings())[3][2],)
    scores, answers = both(model, prompts, choices, stop, batch_size=batch_size)
    assert scores.dtype == torch.float32
    assert torch.allclose(scores, score_choices(model, prompts, choices, 4, PAD, ignore), atol=1e-5, rtol=2e-6)
    assert answers == ask(model, prompts, settings(), stop=stop)


def test_a_cache_that_forgets_is_gone_on_with_too(prompts):
    model = sliding_model()
    scores, answers = both(model, prompts)
    assert torch.allclose(scores, plain_scores(model, prompts, CHOICES), atol=1e-5)
    assert answers == [plain_greedy(model, prompt, 12, ()) for prompt in prompts]


def test_a_peft_model_classifies_and_keeps_its_mode(model, prompts):
    adapted = get_peft_model(
        copy.deepcopy(model), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    )
    scores, answers = both(adapted.train(), prompts)
    assert adapted.training
    assert torch.allclose(scores, plain_scores(adapted.eval(), prompts, CHOICES), atol=1e-5)
    assert answers == ask(adapted, prompts, settings())


def test_sampled_answers_are_those_of_generate(model, prompts):
    warm = {"temperature": 1.0, "top_p": 0.9}
    expected = ask(model, prompts, settings(**warm), seed=3)
    assert both(model, prompts, seed=3, **warm)[1] == expected
    assert both(model, prompts, seed=3, batch_size=1, **warm)[1] == expected


def test_a_prompt_is_read_once_whatever_the_choices(prompts):
    model = tiny_model()
    shapes = []
    model.get_input_embeddings().register_forward_pre_hook(lambda module, inputs: shapes.append(inputs[0].shape))
    seen: list[Progress] = []
    both(model, prompts, batch_size=64, on_progress=seen.append)
    assert shapes == [(11, 64), (11, 2), (11, 1)] + [(11, 1)] * 11
    assert seen == [Progress(11, 11, None)]


def test_a_model_without_such_a_cache_reads_again_and_counts_its_rows_twice(prompts):
    torch.manual_seed(0)
    model = MambaForCausalLM(
        MambaConfig(vocab_size=VOCABULARY, hidden_size=32, state_size=4, num_hidden_layers=2)
    ).eval()
    assert not reads_prompts_once(model) and reads_prompts_once(tiny_model())
    same = [prompts[1][:9], prompts[3][:9]]
    seen: list[Progress] = []
    scores, answers = both(model, same, on_progress=seen.append, max_new_tokens=4)
    assert torch.allclose(scores, score_choices(model, same, CHOICES, 4, PAD, ignore), atol=1e-5)
    assert answers == ask(model, same, settings(max_new_tokens=4))
    assert [(step.done, step.total) for step in seen][-1] == (4, 4)
    assert [step.done for step in seen] == sorted(step.done for step in seen)


def test_classifying_halves_its_batch_when_memory_runs_out_and_refuses_what_the_others_refuse(prompts):
    model = tiny_model()
    expected = both(model, prompts, batch_size=8)
    limit = limit_memory(model, 4)
    seen: list[Progress] = []
    scores, answers = both(model, prompts, batch_size=8, on_progress=seen.append)
    assert answers == expected[1] and torch.allclose(scores, expected[0], atol=1e-5)
    assert [step.event for step in seen if step.event] == ["out of memory with 8 rows at once; went on with 4"]
    limit.remove()
    assert both(model, [])[0].shape == (0, 3)
    with pytest.raises(InputError, match="choices of"):
        both(model, prompts, [[5], []])
    with pytest.raises(InputError, match="prompt 1 has 85"):
        both(model, [[5] * 85])
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    with pytest.raises(ModelError, match="prompt 1 is not a number"):
        both(model, prompts)
