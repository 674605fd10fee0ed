"""Train what the configuration describes: `python train.py experiment=lcd_mini model/solver=dpm_solver_pp_2 model.w_max=8`."""

from lcm.runtime import signals

signals.listen(signals.SIGUSR1)  # before imports that take seconds; SIGTERM ends the program until a training begins

from lcm.app.cli import Program, build, build_all
from lcm.core.numbers import Seed

program = Program(
    "train",
    process_per_job=True,
    name=str,
    seed=Seed,
    ckpt_path=str | None,
    async_checkpoints=bool,
    optimized_metric=str | None,
    trainer="lcm.modules.trainer.Trainer",
)
if __name__ == "__main__":
    program.read_command_line()  # before imports that take seconds: --help and misspelt keys are answered at once

import lightning as L
from omegaconf import DictConfig

from lcm.callbacks.wandb_logger import log_model
from lcm.data.workers import workers_watched
from lcm.modules.trainer import Trainer
from lcm.runtime.launch import check_processes
from lcm.runtime.resume import resume_path
from lcm.runtime.run_dir import ConfigFile, save_metric, start_run, training


@program
def main(cfg: DictConfig) -> float | None:
    """Seed, build and train. Return the metric named by `optimized_metric`, for sweeps."""
    check_processes(cfg.trainer)
    run_dir = start_run(cfg)
    with training(run_dir):
        ckpt_path = resume_path(cfg)
        callbacks, loggers = [ConfigFile(cfg), *build_all(cfg.callbacks)], build_all(cfg.logger)
        trainer = Trainer(**build(cfg.trainer), callbacks=callbacks, logger=loggers, default_root_dir=run_dir)
        L.seed_everything(cfg.seed, workers=True, verbose=False)
        datamodule, model = build(cfg.data), build(cfg.model)
        with workers_watched():
            trainer.fit(model, datamodule, ckpt_path=ckpt_path)
        if trainer.interrupted:
            return None
        model.save_model(f"{run_dir}/model")
        if trainer.is_global_zero:
            print(f"model:   {run_dir}/model")
            log_model(loggers, f"{run_dir}/model", "last")
        return save_metric(run_dir, trainer.callback_metrics.get(cfg.optimized_metric or ""))


if __name__ == "__main__":
    main()
