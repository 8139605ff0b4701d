"""One picture by stable-diffusion.cpp, in a process of its own and in an environment of its own (`make test-clients`).

python render.py '{"model": "model.safetensors", "prompt": "...", "seed": 3, "side": 256, "steps": 4, "lora": "", "out": "p.npy"}'
"""

import json
import sys

import cyllama.sd as sd
import numpy as np


def main() -> None:
    """As the module says."""
    wanted = json.loads(sys.argv[1])
    context = sd.SDContextParams(model_path=wanted["model"], n_threads=wanted["threads"], wtype=sd.SDType.F32)
    context.rng_type = sd.RngType.CPU
    context.lora_apply_mode = sd.LoraApplyMode.IMMEDIATELY
    how = sd.SDImageGenParams(
        prompt=wanted["prompt"], negative_prompt="", width=wanted["side"], height=wanted["side"], seed=wanted["seed"],
        sample_steps=wanted["steps"], cfg_scale=1.0, sample_method=sd.SampleMethod.LCM, scheduler=sd.Scheduler.SIMPLE,
    )  # fmt: skip
    if wanted["lora"]:
        how.set_loras([{"path": wanted["lora"], "multiplier": 1.0}])
    picture = sd.SDContext(context).generate_with_params(how)[0]
    np.save(wanted["out"], np.asarray(picture.to_numpy()))


if __name__ == "__main__":
    main()
