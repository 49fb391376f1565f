"""A stage on a mesh with a pipeline learns what it learns on data shards alone."""

import numpy as np
from workshop import rows

SETTINGS = {
    "TRAIN_STEPS": 4, "LOG_PERIOD": 1, "EVAL_PERIOD": 4, "CHECKPOINT_PERIOD": 4,
    "DROPOUT_RATE": 0.0, "ModelConfig__num_encoder_layers": 2, "ModelConfig__num_decoder_layers": 2,
    "pretrain__Config__num_samples": 2,
}  # fmt: skip


def test_pretraining_in_a_pipeline_has_the_curve_of_data_shards(shop, capsys):
    curves = []
    for name, mesh in (("flat", {"data": 8}), ("piped", {"data": 2, "stage": 2, "tensor": 2})):
        folder = shop.root / f"mesh_{name}"
        more = {"MODEL_DIR": folder, "MIXTURE": shop.text, "MESH": mesh}
        assert shop.run("pretrain", **SETTINGS, **more) == 0
        curves.append(
            [
                (row["step"], key, row[key])
                for row in rows(folder / "metrics.jsonl")
                for key in ("loss", "grad_norm", "eval/loss")
                if key in row
            ]
        )
    assert (
        "2 stages, 2 microbatches, 1 repeat(s): bubble 33.3% of a pass" in capsys.readouterr().out
    )
    flat, piped = curves
    assert [row[:2] for row in flat] == [row[:2] for row in piped] and len(flat) > 8
    np.testing.assert_allclose([row[2] for row in piped], [row[2] for row in flat], rtol=1e-4)
    assert (shop.root / "mesh_piped" / "samples.jsonl").stat().st_size > 0


def test_layers_that_do_not_divide_are_told_before_anything_is_written(shop, capsys):
    folder = shop.root / "mesh_refused"
    more = {"MODEL_DIR": folder, "MIXTURE": shop.text, "MESH": {"data": 2, "stage": 4}}
    assert shop.run("pretrain", **SETTINGS, **more) == 2
    assert "num_decoder_layers = 2 does not divide over 4 stages" in capsys.readouterr().err
    assert not folder.exists()
