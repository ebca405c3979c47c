#!/usr/bin/env bash
# How the classroom weights are made, from nothing: bash data/weights/classroom/recipe.sh [FOLDER [SHARE]]
#
# Minutes decide: give more where you have more. SHARE scales them, and the number of lines (0.01 tries the whole in some
# minutes). README.md says what each stage got for the edition beside this file, and where it went another way: it grew in
# smaller steps, on cores that were shared with other work, and its recogniser started from the first edition's. Needs the
# fonts that `python -m difftsr.text_lines --fonts` lists; with fewer of them the lines are less varied.
set -euo pipefail
run="${1:-runs/classroom}" share="${2:-1}"
of() { awk "BEGIN { print $1 * $share }"; }
pool() {  # NAME COUNT SEED ...
  [[ -d "$run/$1" ]] || python -m difftsr.dataset --pool "$run/$1" --count "$(of "$2" | cut -d. -f1)" --degradations 2 --seed "$3" "${@:4}"
}
train() {  # STAGE POOL MINUTES ...
  python -m difftsr.train --preset classroom --output "$run" --stage "$1" --data "pool:$run/$2" --minutes "$(of "$3")" "${@:4}"
}

# The reader learns from many more faces: three in five of its characters are in Japanese ones too (lesson 01).
faces=(biz-udmincho biz-udpgothic cactus-classical-serif chocolate-classical-sans dela-gothic-one dotgothic16
  hachi-maru-pop hina-mincho huninn kaisei-decol kaisei-harunoumi kaisei-opti kaisei-tokumin kiwi-maru kosugi kosugi-maru
  m-plus-rounded-1c mochiy-pop-one mochiy-pop-p-one new-tegomin potta-one rampart-one reggae-one rocknroll-one
  sawarabi-gothic sawarabi-mincho shippori-antique shippori-antique-b1 shippori-mincho stick train-one wdxl-lubrifont-jp-n
  yuji-boku yuji-mai yuji-syuku yusei-magic zen-antique zen-antique-soft zen-kaku-gothic-new zen-kurenaido
  zen-maru-gothic zen-old-mincho)
[[ -d "$run/faces" ]] || npm install --prefix "$run/faces" "${faces[@]/#/@fontsource/}"

DIFFTSR_FONTS="$run/faces" pool readers 28000 271 --identity 0.08
pool pool 24000 13 --identity 0.08
pool severe 14000 17 --identity 0 --strength severe

train vae pool 21 --warmup 50 --seed 1
train recognizer readers 293 --seed 5 --overrides lr_fraction 0.65
# Mostly at the first time, and from the mean of its noise: a small model that takes one step learns that step.
train idm pool 39 --warmup 40 --learning-rate 1e-3 --seed 22 --overrides first 0.75 temperature 0 ocr_weight 0
# One step and its decoder learn to be sharp; then to draw what they are told, first where only the text can help, and
# then everywhere, with texts as they are read.
train few-step pool 58 --warmup 40 --learning-rate 4e-4 --ema 0.99 --seed 23 --overrides ocr_weight 0
train few-step severe 36 --warmup 20 --learning-rate 6e-4 --ema 0.98 --seed 61 \
  --overrides max_steps 1 columns 16 ocr_lines 8 decoder false jitter 0.004 text_mix 0.1,0.75,0.1,0.05
train few-step pool 78 --warmup 20 --learning-rate 5e-4 --ema 0.98 --seed 62 \
  --overrides max_steps 1 jitter 0.004 text_mix 0.35,0.45,0.1,0.1
train tdm readers 42 --warmup 20 --batch-size 32 --ema 0.98 --seed 31 --overrides text_mix 0.8,0.1,0.05,0.05
train mom pool 7 --warmup 20 --batch-size 8 --ema 0.98 --seed 32
