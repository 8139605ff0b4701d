"""From a folder of your own pictures to a one-step generator, in Python: train a teacher, distil it, show both.

python examples/distil_folder.py MY_PICTURES runs/mine
python examples/distil_folder.py MY_PICTURES runs/try network.name=tiny --both training.num_steps=100
"""

import argparse
from pathlib import Path

import fewstep
from fewstep.formats.pixels import save_grid

RECIPES = Path(__file__).resolve().parents[1] / "recipes"


def main(arguments: list[str] | None = None) -> None:
    """Both runs continue where they were interrupted; settings are those of `fewstep settings`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", help="folder of pictures, one folder a class or none")
    parser.add_argument("out", type=Path, help="folder of both runs")
    parser.add_argument("settings", nargs="*", help="of the teacher, as section.key=value")
    parser.add_argument("--both", nargs="*", default=[], help="of the teacher and the distillation")
    args = parser.parse_args(arguments)
    common = [f"data.images={args.images}", *args.both]
    first = fewstep.load_settings(fewstep.PretrainSettings, RECIPES / "my_pictures.toml", [*common, *args.settings])
    taught = fewstep.pretrain(first, run__folder=args.out / "teacher")
    second = fewstep.load_settings(fewstep.TrainSettings, RECIPES / "my_pictures_dmd2.toml", common)
    distilled = fewstep.train(second, teacher__path=taught.folder, run__folder=args.out / "generator")
    for name, model in (("teacher", taught.teacher), ("generator", distilled.generator)):
        save_grid(args.out / f"{name}.png", model.sample(16, output="tensor"), columns=4)
    print(f"{distilled}: compare {args.out / 'teacher.png'} and {args.out / 'generator.png'}")


if __name__ == "__main__":
    main()
