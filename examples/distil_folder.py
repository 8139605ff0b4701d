"""From a folder of your own pictures to a one-step generator, in Python: train a teacher, distil it, show both.

python examples/distil_folder.py MY_PICTURES runs/mine
python examples/distil_folder.py MY_PICTURES runs/try network.name=tiny --both training.num_steps=100
"""

import argparse
from pathlib import Path

import fewstep
from fewstep.formats.pixels import save_grid
from fewstep.settings import PretrainSettings, TrainSettings, load_settings

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
    first = [*common, *args.settings, f"run.folder={args.out / 'teacher'}"]
    teacher = fewstep.pretrain(load_settings(PretrainSettings, RECIPES / "my_pictures.toml", first))
    second = [*common, f"teacher.path={teacher}", f"run.folder={args.out / 'generator'}"]
    generator = fewstep.train(load_settings(TrainSettings, RECIPES / "my_pictures_dmd2.toml", second))
    save_grid(args.out / "teacher.png", fewstep.load_teacher(teacher).sample(16), columns=4)
    save_grid(args.out / "generator.png", fewstep.load_generator(generator).sample(16), columns=4)
    print(f"{generator}: compare {args.out / 'teacher.png'} and {args.out / 'generator.png'}")


if __name__ == "__main__":
    main()
