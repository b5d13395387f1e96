"""Tasks: what a pair is asked to generate, and how its answers are scored.

A task is a frozen dataclass that extends :class:`~specattn.evaluation.tasks.base.Task`; its fields are its options. It
yields samples and scores one output at a time::

    @dataclass(frozen=True)
    class Capitals(Task):
        name = "capitals"
        metric = "accuracy"
        data: DataFile = DataFile()

        def samples(self, pair):
            for number, row in enumerate(read_jsonl(self.data, "question", "answer")):
                yield Sample(str(number), row["question"], [row["answer"]], max_new_tokens=16, group=row["continent"])

        def score(self, sample, output):
            return float(sample.references[0] in output)

- ``samples`` gives :class:`Sample` and, for what cannot be asked, :class:`LeftOut` with the reason. It is
  deterministic: a run that goes on after an interruption asks for the samples again. It raises a ``UsageError`` first
  if a file is missing or malformed. ``pair`` has a ``tokenizer`` and a ``context_limit`` and may be without weights.
- A prompt is a text or a list of chat messages. ``answer_prefix`` is how the answer begins; the pair goes on from
  there. Samples of one ``group`` have figures of their own, and the task's score is the mean of the groups' means.
- ``score`` is between 0 and 1. A task without a score (accepted lengths, speed) leaves ``metric`` empty and returns 0.
- A sample that does not fit in the context is left out by the runner, with the reason; a task whose protocol shortens
  prompts does so itself, with ``pair.tokenizer`` and ``pair.context_limit``.

The registry finds tasks by name, those of other packages through the entry points ``specattn.tasks``. The runner
(:mod:`specattn.evaluation.tasks.runner`) asks for all samples with every decode method and keeps each answer in a run
folder (:mod:`specattn.evaluation.tasks.run_folder`) as soon as it is there.
"""
