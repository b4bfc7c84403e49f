"""Generation with a causal language model: the answer is what it writes after the prompt, up to the end of a line.

Training learns the first accepted answer, token by token (Malladi et al. 2023, MeZO, https://arxiv.org/abs/2305.17333).
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from zoengine.tasks.base import Batch, Encoded, Task
from zoengine.tasks.cached import greedy
from zoengine.tasks.decoder import Decoder, count
from zoengine.tasks.instance import Instance, TaskError
from zoengine.tasks.metrics import exact_match, f1
from zoengine.tasks.options import scored
from zoengine.tasks.sequences import Scored, Sequences, check_length

_METRICS = {"f1": f1, "exact_match": exact_match}


class Generation(Task):
    """Write the answer to an instance's prompt, by always taking the likeliest token.

    tokenizer: any Hugging Face tokenizer. metric: "f1" or "exact_match". max_new_tokens: of an answer; it ends before
    at a newline or the tokenizer's EOS token. max_length: tokens of prompt and answer together, so a prompt has
    max_new_tokens less, in training too; see :class:`Sequences`.

    The loss is the cross-entropy of tokens, so a batch's mean is over the tokens of its completions.
    """

    def __init__(self, tokenizer: Any, *, metric: str = "f1", max_new_tokens: int = 50, max_length: int = 2048) -> None:
        if metric not in _METRICS:
            raise TaskError(f"metric {metric!r} does not fit generation, which has {', '.join(_METRICS)}")
        self.check(max_new_tokens, max_length)
        self.metric = metric
        self.max_new_tokens = max_new_tokens
        self.reader = Sequences(tokenizer, max_length - max_new_tokens)
        self._decoder = Decoder()
        self._newlines: dict[int, bool] = {}

    @staticmethod
    def check(max_new_tokens: int, max_length: int) -> None:
        """Raises TaskError if an answer leaves no room for its prompt."""
        if not 0 < max_new_tokens <= max_length - 2:
            raise TaskError(f"max_new_tokens is {max_new_tokens}; expected 1 to max_length - 2 = {max_length - 2}")

    def encode(self, instance: Instance) -> Encoded:
        """{"input_ids": the prompt's tokens, "ids" and "start": those with the completion, "answers"}."""
        if not instance.answers:
            raise TaskError(f"an example to generate for has no accepted answer: {instance.prompt[-60:]!r}")
        whole = self.reader.encode(instance.prompt, instance.options[:1])[0]
        prompt = self.reader.prompt(instance.prompt)
        return {"input_ids": prompt, "ids": whole.ids, "start": whole.start, "answers": instance.answers}

    def collate(self, examples: Sequence[Instance | Encoded]) -> Batch:
        """A batch of B examples, encoded or not, with their completions: see :func:`options.scored`."""
        return scored([Scored(item["ids"], item["start"]) for item in self.encoded(examples)])

    def loss_sum(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        """(sum of the tokens' cross-entropy, an fp32 scalar; their number)."""
        found = self._decoder.log_probs(model, batch["input_ids"], batch["start"], batch["targets"], batch["places"])
        return -found.sum(), count(batch["places"])

    def tally(self, model: nn.Module, items: Sequence[Encoded]) -> dict[str, float]:
        loss, tokens = self.loss_sum(model, self.on_device(model, items))
        written = list(zip(self._write(model, items), items, strict=True))
        sums = {name: sum(metric(text, item["answers"]) for text, item in written) for name, metric in _METRICS.items()}
        return {**sums, "loss": float(loss), "tokens": tokens}

    def expected(self, item: Encoded) -> tuple[str, ...]:
        return item["answers"]

    def predict(self, model: nn.Module, examples: Sequence[Instance | Encoded], batch_size: int = 32) -> list[str]:
        return self.for_each(model, self.encoded(examples), batch_size, lambda items: self._write(model, items))

    def scores(self, model: nn.Module, encoded: Sequence[Encoded], batch_size: int = 32) -> list[float]:
        """The metric of each example alone."""
        found = self.predict(model, encoded, batch_size)
        return [_METRICS[self.metric](text, item["answers"]) for text, item in zip(found, encoded, strict=True)]

    def size(self, item: Encoded) -> tuple[int, int]:
        return 1, max(len(item["input_ids"]) + self.max_new_tokens, len(item["ids"]))

    def _write(self, model: nn.Module, items: Sequence[Encoded]) -> list[str]:
        """The model's answers, each a line without outer white space."""
        prompts = [item["input_ids"] for item in items]
        check_length(model, max(map(len, prompts)) + self.max_new_tokens)
        tokenizer = self.reader.tokenizer
        written = greedy(model, prompts, self.max_new_tokens, self._ends)
        texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in written]
        return [text.partition("\n")[0].strip() for text in texts]

    def _ends(self, token: int) -> bool:
        tokenizer = self.reader.tokenizer
        if token not in self._newlines:
            self._newlines[token] = token == tokenizer.eos_token_id or "\n" in tokenizer.decode([token])
        return self._newlines[token]
