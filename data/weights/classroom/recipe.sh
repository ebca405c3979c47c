#!/usr/bin/env bash
# How the classroom weights are made, from nothing: bash data/weights/classroom/recipe.sh [FOLDER]
#
# Minutes decide: give more where you have more. README.md says what each stage got for the edition beside this file, and
# where it went another way: it grew in smaller steps, on cores that were shared with other work, and its recogniser
# started from the first edition's. Needs the fonts that `python -m difftsr.text_lines --fonts` lists; with fewer of
# them the lines are less varied.
set -euo pipefail
run="${1:-runs/classroom}"
pool="$run/pool"
train() { python -m difftsr.train --preset classroom --output "$run" --data "pool:$pool" "$@"; }

[[ -d "$pool" ]] || python -m difftsr.dataset --pool "$pool" --count 20000 --degradations 2 --identity 0.08 --seed 11

train --stage vae --minutes 21 --warmup 50 --seed 1
train --stage recognizer --minutes 140 --seed 5
# Mostly at the first time, and from the mean of its noise: a small model that takes one step learns that step.
train --stage idm --minutes 30 --warmup 40 --learning-rate 1e-3 --seed 22 --overrides first 0.75 temperature 0 ocr_weight 0
train --stage few-step --minutes 60 --warmup 40 --learning-rate 4e-4 --ema 0.99 --seed 23
train --stage tdm --minutes 8 --warmup 20 --batch-size 32 --ema 0.99 --seed 31
train --stage mom --minutes 5 --warmup 20 --batch-size 8 --ema 0.99 --seed 32
