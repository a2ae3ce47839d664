"""Predicts with a finetuned model, for any input that prepare reads (data sets too).

    python launch/predict.py checkpoint=RUN2 input=new.csv output=predictions.csv
    python launch/predict.py checkpoint=RUN2 input=cifs/ output=predictions.csv device=cuda

Writes `id,prediction`, one line a crystal in the order of the input; crystals that cannot be used
are listed with their reason beside it, in predictions.dropped.csv. Into a pipe (output=/dev/stdout)
the lines go as they come, and all else goes to standard error. Crystals are brought to the cell
that the model was trained on (cell=primitive, niggli or as_is for another); predictions of targets
that go with the cell are for the cell in the input. Crystals unlike those that the model learned
from are told of, or left out with strict=true. What was asked for is kept in
predictions.request.json: the same command finds that its work is done.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a file of a checkout
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from crysforge.datapipe.common import threads

threads.choose()

from crysforge.datapipe.common.places import is_stream
from crysforge.trainer.base.command_line import parse, required
from crysforge.trainer.base.script import run
from crysforge.trainer.serving.config import PredictConfig


def main() -> None:
    config = parse(PredictConfig, __doc__)
    required(config, "checkpoint", "input", "output")
    output = Path(config.output)
    through = is_stream(output)
    if output.resolve() == Path(config.input).resolve():
        raise ValueError(f"output {output} is the input: choose another output")
    from crysforge.trainer.serving.load import load
    from crysforge.trainer.serving.predict import dropped_path, predict_to_csv
    from crysforge.trainer.serving.request import predicted_before, request_for

    said = sys.stderr if through else sys.stdout
    print(threads.describe(), file=said)
    if output.exists() and not config.overwrite and not through:
        done = predicted_before(output, request_for(config))
        if done is None:
            raise ValueError(f"{output} exists: choose another output, or overwrite=true")
        print(f"{done[0]} predictions are there already: {output}")
        return
    model = load(config.checkpoint, device=config.device, max_pairs=config.max_pairs)
    model.require_head()
    if remark := config.remark(model.trained_on):
        print(f"note: {remark}", file=said)
    crystals = config.read(model.trained_on)
    asked = "" if through else request_for(config)
    counts = predict_to_csv(model, crystals, output, config.max_atoms, config.strict, asked)
    listed = dropped_path(output)
    if not counts.written:
        raise ValueError(f"no crystal of {config.input} could be used: {listed} says why")
    units = ", ".join(
        f"{n} ({u})" if u else n for n, u in zip(model.targets, model.units, strict=True)
    )
    print(f"{counts.written} predictions of {units}: {output}", file=said)
    if counts.dropped:
        print(f"{counts.dropped} crystals could not be used: {listed}", file=said)
    if str(counts.outsiders):
        print(f"note: {counts.outsiders}", file=said)


if __name__ == "__main__":
    run(main)
