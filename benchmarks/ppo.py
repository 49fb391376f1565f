"""One PPO iteration of a 22.7M-parameter T5 1.1: ours beside Hugging Face torch loops.

    python benchmarks/ppo.py [--check] [--trl_python=PYTHON]

64 prompts of 64 tokens, one answer of 64 tokens each, then 4 epochs x 2 minibatches of AdamW. Both
sides hold the same float32 weights and do the same work: sample from the whole vocabulary, score
the answers by policy, reference and critic (a head on the policy) in one pass each, entropies
included, ask a Python function of the ids for the rewards, make generalised advantages with the
price of divergence in the rewards, and learn with clipped policy and value losses. No token ends
an answer, so that all lengths are equal. Ours runs the functions that `python run.py ppo` is made
of; the peer is what a careful user writes: `generate` with its cache, no gradients where none are
needed, fused cross-entropy and AdamW.

Before anything is timed both sides score 8 given answers and take one step on them: log-probs,
entropies and norms of the gradients must agree, or nothing is reported. They run in processes of
their own and take turns.

With `--trl_python` TRL takes a turn too: Hugging Face's own trainer, in its last release for
encoder-decoders, on the same model, prompts, lengths, rewards, epochs and minibatches. Advantages,
metrics and optimizer are as it makes them by itself, so it is not held to the same numbers.

    python -m venv trl && trl/bin/pip install torch==2.13.0 trl==0.11.4 transformers==4.46.3 rich
"""

import argparse
import dataclasses
import functools
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import common
import numpy as np
import train_step

EPOCHS, MINIBATCHES = 4, 2
LEARNING_RATE, ADAM = 3e-6, {"b1": 0.9, "b2": 0.95, "eps": 1e-5}
CLIP, VALUE_CLIP, VALUE_COEF, KL_COEF, LAMBDA, CLIP_NORM = 0.2, 0.2, 0.1, 0.05, 0.95, 1.0
NO_END = -1  # no token is the end token
PHASES = ("generate", "score", "update")
LOG_PROB_TOLERANCE, NORM_TOLERANCE = 1e-4, 1e-3  # nats; of itself
GOAL, FLOOR = 5.0, 2.5
PEERS = {"hf": "a careful torch loop", "trl": "TRL's PPOTrainer"}
COLUMNS = (
    "date", "device", "versions", "commit", "prompts x (in + new)", "peer", "ours", "peer's",
    "x peer", "ours/peer samples/s", "ours generate/score/update tok/s",
    "peer generate/score/update tok/s", "generation's share ours/peer", "peak MiB ours/peer",
)  # fmt: skip


# ------------------------------------------------------------------------------- the shared problem


@dataclasses.dataclass(frozen=True)
class Problem:
    """Shapes of an iteration, and what both sides are given."""

    rows: int
    input_length: int
    answer_length: int

    def tokens(self, seed: int, rows: int, length: int) -> np.ndarray:
        """Random ids without padding and end token, int32 `[rows, length]`."""
        ids = np.random.default_rng(seed).integers(3, train_step.VOCAB_SIZE - 128, (rows, length))
        return ids.astype(np.int32)

    def prompts(self, iteration: int) -> np.ndarray:
        """The prompts of an iteration, int32 `[B, S]`."""
        return self.tokens(iteration, self.rows, self.input_length)

    def given(self) -> tuple[np.ndarray, np.ndarray]:
        """Prompts and answers on which both sides must agree, int32 `[8, S]` and `[8, T]`."""
        lengths = (self.input_length, self.answer_length)
        return tuple(self.tokens(1000 + length, 8, length) for length in lengths)


def rewards_of(tokens: np.ndarray) -> np.ndarray:
    """The reward function of both sides: the share of even ids of answers `[B, T]`."""
    return (tokens % 2 == 0).mean(axis=-1).astype(np.float32)


def value_head() -> np.ndarray:
    """The first weights of the critic's head, float32 `[D]`."""
    width = train_step.EMBED_DIM
    draw = np.random.default_rng(7).standard_normal(width) / (width + 1) ** 0.5
    return draw.astype(np.float32)


def reference_weights(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Weights of a reference that is not the policy, for the comparison."""
    return {**weights, "head": weights["head"] * np.float32(0.9)}


@dataclasses.dataclass
class System:
    """One side.

    iterate: a whole iteration; returns the seconds of each phase and a few figures.
    compare: scores the given answers, takes one step on all of them; see `agree`.
    """

    iterate: Callable[[int], tuple[dict[str, float], dict[str, float]]]
    compare: Callable[[], dict[str, Any]]
    description: str


# ---------------------------------------------------------------------------------------- ours


class Ours:
    """Our compiled programs for one shape and one cut of it."""

    def __init__(self, epochs: int, minibatches: int, answer_length: int) -> None:
        """Builds model, critic, optimizers and the three programs."""
        from chatyuan.align.config import AlignConfig
        from chatyuan.align.experience import make_score
        from chatyuan.align.roles import Critic, Split
        from chatyuan.align.rollout import RolloutConfig, make_rollout
        from chatyuan.align.update import Learner, make_update
        from chatyuan.models import build
        from chatyuan.models.reward import RewardModel
        from chatyuan.train.optimizers import OptimizerConfig, make_optimizer
        from chatyuan.train.schedules import ScheduleConfig, make_schedule

        shape = train_step.our_config()
        self.model, self.split = build(shape), Split()
        self.critic = Critic(RewardModel(shape), separate=False)
        schedule = make_schedule(ScheduleConfig(name="constant", learning_rate=LEARNING_RATE))
        adam = OptimizerConfig(name="adamw", weight_decay=0.0, clip_norm=CLIP_NORM, **ADAM)

        def optimizer(role: Any) -> Any:
            return make_optimizer(adam, schedule, role.abstract_params(), role.logical_axes())

        self.optimizer, self.critic_optimizer = optimizer(self.model), optimizer(self.critic)
        config = AlignConfig(
            method="ppo", epochs=epochs, minibatches=minibatches, clip=CLIP, value_clip=VALUE_CLIP,
            value_coef=VALUE_COEF, kl_coef=KL_COEF, lam=LAMBDA,
        )  # fmt: skip
        drawing = RolloutConfig(max_length=answer_length)
        self.rollout = make_rollout(self.model, drawing, eos_id=NO_END)
        self.score = make_score(self.model, split=self.split, critic=self.critic)
        self.update = make_update(
            Learner(
                config, self.model, self.split, self.optimizer, self.critic, self.critic_optimizer,
                eos_id=NO_END,
            )
        )  # fmt: skip

    def state(self, weights: dict[str, np.ndarray]) -> Any:
        """The state before the first iteration."""
        import jax
        import jax.numpy as jnp

        from chatyuan.align.roles import init_state

        head = {"kernel": jnp.asarray(value_head()), "bias": jnp.zeros((), jnp.float32)}
        return init_state(
            jax.tree.map(jnp.asarray, train_step.our_parameters(weights)), {"head": head},
            optimizer=self.optimizer, critic_optimizer=self.critic_optimizer, split=self.split,
            kl_coef=KL_COEF,
        )  # fmt: skip


def make_ours(weights: dict[str, np.ndarray], problem: Problem) -> System:
    """Our rollout, scoring and update, with every default of the library."""
    from chatyuan.stages import _host

    _host.configure()  # as run.py does
    import jax
    import jax.numpy as jnp

    _host.imported()

    from chatyuan.align.answers import Answers
    from chatyuan.align.rollout import Rollouts

    def reference(of: dict[str, np.ndarray]) -> Any:
        return jax.tree.map(jnp.asarray, train_step.our_parameters(of))

    programs = Ours(EPOCHS, MINIBATCHES, problem.answer_length)
    state, kept = [programs.state(weights)], reference(weights)
    lengths = np.full(problem.rows, problem.input_length, np.int32)

    def iterate(iteration: int) -> tuple[dict[str, float], dict[str, float]]:
        ids = np.arange(problem.rows, dtype=np.uint32) + np.uint32(iteration * problem.rows)
        marks = [time.perf_counter()]
        prompts = problem.prompts(iteration)
        rollouts = programs.rollout(state[0].params, prompts, lengths, ids)
        jax.block_until_ready(rollouts)
        marks.append(time.perf_counter())
        experience = programs.score(state[0].params, kept, state[0].critic, (), rollouts)
        rewards = rewards_of(jax.device_get(rollouts.answers.tokens)[:, 0])
        jax.block_until_ready(experience)
        marks.append(time.perf_counter())
        state[0], metrics = programs.update(state[0], experience, jnp.asarray(rewards[:, None]))
        jax.block_until_ready(state[0])
        marks.append(time.perf_counter())
        figures = {
            name: float(metrics[name][0] / metrics[name][1])
            for name in ("score", "kl", "entropy", "first_ratio", "approx_kl", "clip_fraction")
        }
        return dict(zip(PHASES, np.diff(marks).tolist(), strict=True)), figures

    def compare() -> dict[str, Any]:
        once = Ours(1, 1, problem.answer_length)
        start = once.state(weights)
        prompts, tokens = map(jnp.asarray, problem.given())
        full = functools.partial(jnp.full, dtype=jnp.int32)
        sizes = full(8, problem.input_length), full((8, 1), problem.answer_length)
        answers = Answers(prompts, sizes[0], tokens[:, None], sizes[1])
        zeros = jnp.zeros(answers.tokens.shape, jnp.float32)
        rollouts = Rollouts(answers, zeros, jnp.arange(8, dtype=jnp.uint32))
        other = reference(reference_weights(weights))
        before = once.score(start.params, other, start.critic, (), rollouts)
        rewards = rewards_of(np.asarray(tokens))[:, None]
        end, metrics = once.update(start, before, jnp.asarray(rewards))
        after = once.score(end.params, other, end.critic, (), rollouts)
        found = {name: getattr(before, name) for name in ("log_probs", "reference_log_probs")}
        found |= {"entropies": before.entropies, "values": before.values}
        found = {name: np.asarray(value)[:, 0].tolist() for name, value in found.items()}
        norms = {n: float(metrics[n][0]) for n in ("grad_norm", "critic_grad_norm", "value_loss")}
        moved = np.asarray(after.log_probs - before.log_probs)[:, 0].tolist()
        return {**found, "scalars": norms, "moved": moved}

    return System(iterate, compare, common.versions("jax", "flax", "optax"))


# ---------------------------------------------------------------------------------------- the peer


class Peer:
    """Policy with a value head, reference, optimizer: PPO in eager torch."""

    def __init__(
        self, weights: dict[str, np.ndarray], reference: dict[str, np.ndarray], problem: Problem
    ) -> None:
        """Builds the models and the optimizer."""
        import torch

        self.torch, self.problem = torch, problem
        self.policy = train_step.hf_model(weights).eval()
        self.reference = train_step.hf_model(reference).eval().requires_grad_(False)
        self.value_head = torch.nn.Linear(train_step.EMBED_DIM, 1)
        with torch.no_grad():
            self.value_head.weight.copy_(torch.from_numpy(value_head()[None]))
            self.value_head.bias.zero_()
        parameters = [*self.policy.parameters(), *self.value_head.parameters()]
        self.optimizer = torch.optim.AdamW(
            parameters, LEARNING_RATE, betas=(ADAM["b1"], ADAM["b2"]), eps=ADAM["eps"],
            weight_decay=0.0, fused=True,
        )  # fmt: skip

    def generate(self, prompts: Any) -> Any:
        """Samples one answer a prompt, int64 `[B, T]`."""
        length = self.problem.answer_length
        output = self.policy.generate(
            input_ids=prompts, attention_mask=self.torch.ones_like(prompts), do_sample=True,
            max_new_tokens=length, top_k=0, use_cache=True, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        assert output.shape == (len(prompts), length + 1)
        return output[:, 1:]

    def forward(self, model: Any, prompts: Any, answers: Any) -> tuple[Any, Any]:
        """Logits `[B, T, V]` and the states below them `[B, T, D]`."""
        read = self.torch.nn.functional.pad(answers[:, :-1], (1, 0))
        output = model(
            input_ids=prompts, attention_mask=self.torch.ones_like(prompts),
            decoder_input_ids=read, output_hidden_states=True, use_cache=False,
        )  # fmt: skip
        return output.logits, output.decoder_hidden_states[-1]

    def log_probs(self, logits: Any, answers: Any) -> Any:
        """Log-probabilities of the answers' tokens, `[B, T]`."""
        cross_entropy = self.torch.nn.functional.cross_entropy
        losses = cross_entropy(logits.flatten(0, 1), answers.flatten(), reduction="none")
        return -losses.view(answers.shape)

    def score(self, prompts: Any, answers: Any) -> dict[str, Any]:
        """What the update reads of the answers, each `[B, T]`; half of the batch at a time."""
        torch, parts = self.torch, []
        with torch.no_grad():
            for rows in torch.arange(len(prompts)).chunk(MINIBATCHES):
                here = prompts[rows], answers[rows]
                logits, hidden = self.forward(self.policy, *here)
                log_z = torch.logsumexp(logits, dim=-1)
                mean = (torch.softmax(logits, dim=-1) * logits).sum(-1)
                found = {
                    "log_probs": self.log_probs(logits, here[1]),
                    "entropies": log_z - mean,
                    "values": self.value_head(hidden)[..., 0],
                }
                logits, _ = self.forward(self.reference, *here)
                parts.append({**found, "reference_log_probs": self.log_probs(logits, here[1])})
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def targets(self, scored: dict[str, Any], rewards: np.ndarray) -> tuple[Any, Any]:
        """Whitened advantages and returns, `[B, T]`."""
        torch = self.torch
        values = scored["values"]
        gained = -KL_COEF * (scored["log_probs"] - scored["reference_log_probs"])
        gained[:, -1] += torch.from_numpy(rewards)
        advantages, last = torch.zeros_like(values), torch.zeros(len(values))
        for place in reversed(range(values.shape[1])):
            following = values[:, place + 1] if place + 1 < values.shape[1] else 0.0
            last = gained[:, place] + following - values[:, place] + LAMBDA * last
            advantages[:, place] = last
        returns = advantages + values
        spread = torch.rsqrt(advantages.var() + 1e-8)
        return (advantages - advantages.mean()) * spread, returns

    def step(self, prompts: Any, answers: Any, old: dict[str, Any]) -> dict[str, float]:
        """One optimizer step on a minibatch."""
        torch = self.torch
        logits, hidden = self.forward(self.policy, prompts, answers)
        ratio = torch.exp(self.log_probs(logits, answers) - old["log_probs"])
        values, gained = self.value_head(hidden)[..., 0], old["advantages"]
        policy = torch.maximum(-gained * ratio, -gained * ratio.clamp(1 - CLIP, 1 + CLIP)).mean()
        near = old["values"] + (values - old["values"]).clamp(-VALUE_CLIP, VALUE_CLIP)
        errors = torch.maximum((values - old["returns"]) ** 2, (near - old["returns"]) ** 2)
        value = 0.5 * errors.mean()
        self.optimizer.zero_grad(set_to_none=True)
        (policy + VALUE_COEF * value).backward()
        clip = torch.nn.utils.clip_grad_norm_
        norm = clip(self.policy.parameters(), CLIP_NORM)
        critic_norm = clip(self.value_head.parameters(), CLIP_NORM)
        self.optimizer.step()
        figures = {"grad_norm": norm, "critic_grad_norm": critic_norm, "value_loss": value}
        return {name: x.item() for name, x in figures.items()}

    def update(
        self, prompts: Any, answers: Any, scored: dict[str, Any], rewards: np.ndarray,
        epochs: int = EPOCHS, minibatches: int = MINIBATCHES,
    ) -> dict[str, float]:  # fmt: skip
        """All optimizer steps of an iteration; returns the figures of the last."""
        advantages, returns = self.targets(scored, rewards)
        old = {**scored, "advantages": advantages, "returns": returns}
        figures = {}
        for _ in range(epochs):
            for rows in self.torch.randperm(len(prompts)).chunk(minibatches):
                part = {name: value[rows] for name, value in old.items()}
                figures = self.step(prompts[rows], answers[rows], part)
        return figures


def make_hf(weights: dict[str, np.ndarray], problem: Problem) -> System:
    """The Hugging Face torch loop."""
    import torch

    torch.manual_seed(0)
    peer = Peer(weights, weights, problem)

    def iterate(iteration: int) -> tuple[dict[str, float], dict[str, float]]:
        marks = [time.perf_counter()]
        prompts = torch.from_numpy(problem.prompts(iteration).astype(np.int64))
        answers = peer.generate(prompts)
        marks.append(time.perf_counter())
        scored = peer.score(prompts, answers)
        rewards = rewards_of(answers.numpy())
        marks.append(time.perf_counter())
        peer.update(prompts, answers, scored, rewards)
        marks.append(time.perf_counter())
        kl = (scored["log_probs"] - scored["reference_log_probs"]).sum(-1).mean().item()
        figures = {"score": float(rewards.mean()), "kl": kl}
        figures["entropy"] = scored["entropies"].mean().item()
        return dict(zip(PHASES, np.diff(marks).tolist(), strict=True)), figures

    def compare() -> dict[str, Any]:
        once = Peer(weights, reference_weights(weights), problem)
        prompts, answers = (torch.from_numpy(x.astype(np.int64)) for x in problem.given())
        scored = once.score(prompts, answers)
        scalars = once.update(prompts, answers, scored, rewards_of(answers.numpy()), 1, 1)
        moved = once.score(prompts, answers)["log_probs"] - scored["log_probs"]
        found = {name: value.tolist() for name, value in scored.items()}
        return {**found, "scalars": scalars, "moved": moved.tolist()}

    threads = f"{torch.get_num_threads()} threads"
    return System(iterate, compare, f"{common.versions('torch', 'transformers')}, {threads}")


def make_trl(weights: dict[str, np.ndarray], problem: Problem) -> System:
    """TRL's PPOTrainer with the settings above; what they leave open is its default."""
    import tokenizers
    import torch
    import transformers
    import trl

    torch.manual_seed(0)
    transformers.utils.logging.disable_progress_bar()

    def role() -> Any:
        model = train_step.hf_model(weights)
        return trl.AutoModelForSeq2SeqLMWithValueHead.from_pretrained(model)

    # It wants a tokenizer, to pad with and to look for an end, which is one that is never drawn.
    names = {"pad_token": "<pad>", "eos_token": "</s>"}
    words = dict(zip(names.values(), (0, train_step.VOCAB_SIZE), strict=True))
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(words))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, **names)
    config = trl.PPOConfig(
        batch_size=problem.rows, mini_batch_size=problem.rows // MINIBATCHES, ppo_epochs=EPOCHS,
        learning_rate=LEARNING_RATE, cliprange=CLIP, cliprange_value=VALUE_CLIP, gamma=1.0,
        vf_coef=VALUE_COEF, lam=LAMBDA, adap_kl_ctrl=False, init_kl_coef=KL_COEF,
        max_grad_norm=CLIP_NORM,
    )  # fmt: skip
    trainer = trl.PPOTrainer(config, role(), role(), tokenizer)
    drawing = {"do_sample": True, "top_k": 0, "eos_token_id": NO_END, "pad_token_id": 0}

    def iterate(iteration: int) -> tuple[dict[str, float], dict[str, float]]:
        begin = time.perf_counter()
        prompts = list(torch.from_numpy(problem.prompts(iteration).astype(np.int64)))
        answers = trainer.generate(
            prompts, batch_size=problem.rows, max_new_tokens=problem.answer_length, **drawing
        )
        drawn = time.perf_counter()
        assert {len(answer) for answer in answers} == {problem.answer_length + 1}
        rewards = rewards_of(torch.stack(answers)[:, 1:].numpy())
        told = trainer.step(prompts, answers, list(torch.from_numpy(rewards)))
        end, score = time.perf_counter(), float(told["time/ppo/forward_pass"])
        seconds = {"generate": drawn - begin, "score": score, "update": end - drawn - score}
        named = {"score": "ppo/mean_scores", "kl": "objective/kl", "entropy": "objective/entropy"}
        return seconds, {name: float(told[key]) for name, key in named.items()}

    threads = f"{torch.get_num_threads()} threads"
    return System(iterate, dict, f"{common.versions('trl', 'torch', 'transformers')}, {threads}")


# ------------------------------------------------------------------------------------------ driver


def serve(arguments: argparse.Namespace) -> None:
    """The worker's side: builds the system, then does as told."""
    problem = Problem(arguments.prompts, arguments.input_length, arguments.answer_length)
    weights = dict(np.load(arguments.weights))
    makers = {"ours": make_ours, "hf": make_hf, "trl": make_trl}
    system = makers[arguments.worker](weights, problem)
    common.reply(description=system.description)
    iteration, seconds = 0, []
    for command in common.commands():
        if command["command"] == "compare":
            common.reply(**system.compare())
        elif command["command"] == "warm":
            system.iterate(iteration)
            common.reply()
        elif command["command"] == "run":
            phases, figures = system.iterate(iteration)
            seconds.append(phases)
            common.reply(seconds=[sum(phases.values())], **figures)
        elif command["command"] == "phases":
            medians = {name: statistics.median(s[name] for s in seconds) for name in PHASES}
            common.reply(medians=medians, figures=figures, peak_mib=common.peak_rss_mib())
        iteration += command["command"] in ("warm", "run")


def agree(ours: dict[str, Any], peer: dict[str, Any]) -> None:
    """Prints how far the two sides lie apart on the given answers; too far ends the benchmark."""
    apart = {}
    for name in ("log_probs", "reference_log_probs", "entropies", "values"):
        apart[name] = float(np.abs(np.subtract(ours[name], peer[name])).max())
    print("  same parameters, 8 given answers; largest differences (nats; values):", apart)
    norms = {
        name: abs(value / peer["scalars"][name] - 1) for name, value in ours["scalars"].items()
    }
    print("  one step on them; relative differences:", norms)
    moved = np.asarray(ours["moved"])
    gap = float(np.abs(moved - np.asarray(peer["moved"])).max() / np.abs(moved).max())
    far = np.abs(moved).max()
    print(f"  log-probs moved by it by up to {far:.4f} nats; largest difference {gap:.2%} of that")
    if max(apart.values()) > LOG_PROB_TOLERANCE or max(norms.values()) > NORM_TOLERANCE:
        raise SystemExit("the systems do not compute the same thing: their times are not compared")


def flops(problem: Problem) -> dict[str, float]:
    """FLOPs of each phase of an iteration that both sides cannot do without.

    Attention's scores are left out. Scoring is a forward pass of policy and reference, learning a
    forward and a backward pass (twice the forward) for each epoch.
    """
    width, heads = train_step.EMBED_DIM, train_step.NUM_HEADS * train_step.HEAD_DIM
    attention, mlp = 4 * width * heads, 3 * width * train_step.MLP_DIM
    layers, head = train_step.NUM_LAYERS, width * train_step.VOCAB_SIZE
    read = problem.rows * problem.input_length
    drawn = problem.rows * problem.answer_length
    cross = 2 * width * heads
    encode = 2.0 * read * layers * (attention + mlp + cross)  # the decoder's keys and values too
    decode = 2.0 * drawn * (layers * (2 * attention - cross + mlp) + head)
    forward = encode + decode
    return dict(zip(PHASES, (forward, 2 * forward, 3 * EPOCHS * forward), strict=True))


def measure(arguments: argparse.Namespace, weights: str, problem: Problem) -> dict[str, Any]:
    """Starts, compares and times the systems."""
    python = {"ours": sys.executable, "hf": arguments.hf_python}
    if arguments.trl_python is None:
        print("  TRL is left out: --trl_python names none")
    else:
        python["trl"] = arguments.trl_python
    workers = []
    for name in python:
        command = [
            python[name], __file__, f"--worker={name}", f"--weights={weights}",
            f"--prompts={problem.rows}", f"--input_length={problem.input_length}",
            f"--answer_length={problem.answer_length}",
        ]  # fmt: skip
        quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        quiet["PYTHONWARNINGS"] = "ignore"  # TRL says that it is deprecated
        workers.append(common.Worker(name, command, quiet))
    try:
        started = {worker.name: worker.answer()["description"] for worker in workers}
        for name, description in started.items():
            print(f"  {name}: {description}", flush=True)
        agree(*(worker.ask("compare") for worker in workers[:2]))
        for worker in workers:
            worker.ask("warm")
        timings = common.take_turns(workers, runs=arguments.runs)
        details = {worker.name: worker.ask("phases") for worker in workers}
    finally:
        for worker in workers:
            worker.close()
    return {"started": started, "timings": timings, "details": details}


def report(problem: Problem, result: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Prints each side's phases; returns tokens a second of each."""
    counted, rates = flops(problem), {}
    drawn = problem.rows * problem.answer_length
    tokens = dict(zip(PHASES, (drawn, drawn, EPOCHS * drawn), strict=True))
    for name, timing in result["timings"].items():
        details = result["details"][name]
        medians = details["medians"]
        total = sum(medians.values())
        rates[name] = {phase: tokens[phase] / medians[phase] for phase in PHASES}
        print(f"  {name}: {timing}, {problem.rows / timing.median:.2f} samples/s, ", end="")
        print(f"peak {details['peak_mib']:.0f} MiB, last {details['figures']}")
        for phase in PHASES:
            speed = counted[phase] / medians[phase] / 1e9
            print(
                f"    {phase}: {medians[phase]:.3f} s, {medians[phase] / total:.0%}, "
                f"{rates[name][phase]:,.0f} answer tokens/s, {speed:.0f} GFLOP/s"
            )
    return rates


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; `--worker` and what follows it are for this program's own processes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    common.add_common_flags(parser)
    parser.add_argument("--hf_python", default=sys.executable, help="the Python with torch")
    parser.add_argument("--trl_python", help="the Python with TRL, see above")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--input_length", type=int, default=64)
    parser.add_argument("--answer_length", type=int, default=64)
    for name in ("worker", "weights"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(arguments: argparse.Namespace) -> int:
    """Measures one iteration and prints the verdict."""
    problem = Problem(arguments.prompts, arguments.input_length, arguments.answer_length)
    shape = f"{problem.rows} x ({problem.input_length} + {problem.answer_length})"
    device = common.cpu_name()
    common.print_configuration(
        "PPO, T5 1.1: D 256, F 512 gated gelu, 4 heads x 64, 4+4 layers, V 32128, float32",
        {
            "device": device, "commit": common.commit(), "runs": arguments.runs,
            "prompts x (in + new)": shape, "epochs x minibatches": f"{EPOCHS} x {MINIBATCHES}",
            "critic": "a head on the policy", "reward": "a Python function of the ids",
            "GFLOP of a phase": {n: round(x / 1e9) for n, x in flops(problem).items()},
        },
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        weights = pathlib.Path(folder) / "weights.npz"
        train_step.make_weights(weights)
        result = measure(arguments, str(weights), problem)
    rates = report(problem, result)
    timings, details = result["timings"], result["details"]

    def row(peer: str) -> list[str]:
        def joined(function: Callable[[str], str]) -> str:
            return "/".join(function(name) for name in ("ours", peer))

        def share(name: str) -> float:
            medians = details[name]["medians"]
            return medians["generate"] / sum(medians.values())

        return [
            common.today(), device, f"{result['started']['ours']}; {result['started'][peer]}",
            common.commit(), shape, PEERS[peer], *(str(timings[name]) for name in ("ours", peer)),
            f"{ratios[peer]:.2f}", joined(lambda n: f"{problem.rows / timings[n].median:.2f}"),
            *("/".join(f"{rate:,.0f}" for rate in rates[n].values()) for n in ("ours", peer)),
            joined(lambda n: f"{share(n):.0%}"), joined(lambda n: f"{details[n]['peak_mib']:.0f}"),
        ]  # fmt: skip

    ratios = {n: t.median / timings["ours"].median for n, t in timings.items() if n != "ours"}
    if not arguments.no_record:
        common.append_rows("PPO", COLUMNS, [row(peer) for peer in ratios])
    checks = [
        common.Check(f"samples/s against {PEERS[peer]}", ratio, GOAL, FLOOR, unit="x")
        for peer, ratio in ratios.items()
    ]
    return common.finish(checks, arguments.check)


if __name__ == "__main__":
    options = parse()
    sys.exit(serve(options) if options.worker else main(options))
