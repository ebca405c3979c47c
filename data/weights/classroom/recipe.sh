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
train() {  # STAGE DATA MINUTES ...
  python -m difftsr.train --preset classroom --output "$run" --stage "$1" --data "$2" --minutes "$(of "$3")" "${@:4}"
}

# The reader learns from many more faces: three in five of its characters are in Japanese ones too (lesson 01), and
# letters and digits have the faces of signs.
faces=(biz-udmincho biz-udpgothic cactus-classical-serif chocolate-classical-sans dela-gothic-one dotgothic16
  hachi-maru-pop hina-mincho huninn kaisei-decol kaisei-harunoumi kaisei-opti kaisei-tokumin kiwi-maru kosugi kosugi-maru
  m-plus-rounded-1c mochiy-pop-one mochiy-pop-p-one new-tegomin potta-one rampart-one reggae-one rocknroll-one
  sawarabi-gothic sawarabi-mincho shippori-antique shippori-antique-b1 shippori-mincho stick train-one wdxl-lubrifont-jp-n
  yuji-boku yuji-mai yuji-syuku yusei-magic zen-antique zen-antique-soft zen-kaku-gothic-new zen-kurenaido
  zen-maru-gothic zen-old-mincho)
letters=(abril-fatface alfa-slab-one amatic-sc anonymous-pro anton archivo-black archivo-narrow arvo audiowide baloo-2
  bangers barlow-condensed bebas-neue bitter caveat cinzel comfortaa cormorant-garamond courier-prime crimson-text
  cutive-mono dancing-script eb-garamond exo-2 fjalla-one fredoka ibm-plex-mono ibm-plex-serif inconsolata
  indie-flower josefin-sans kalam libre-baskerville lobster lora luckiest-guy merriweather montserrat nunito orbitron
  oswald pacifico patrick-hand patua-one permanent-marker playfair-display poppins press-start-2p quicksand raleway
  righteous roboto-slab rokkitt russo-one satisfy shadows-into-light share-tech-mono space-mono special-elite
  staatliches teko ubuntu vt323 zilla-slab)
[[ -d "$run/faces" ]] || npm install --prefix "$run/faces" "${faces[@]/#/@fontsource/}" "${letters[@]/#/@fontsource/}"

pool pool 24000 13 --identity 0.08
pool severe 14000 17 --identity 0 --strength severe

train vae "pool:$run/pool" 21 --warmup 50 --seed 1
# Every line is new to the reader (28,000 it learns by heart): one process renders while another learns. Two short cycles
# go on from there, each on lines of its own, and the mean of the three reads new faces better than any of them.
export DIFFTSR_FONTS="$run/faces"
train recognizer synthetic 240 --workers 1 --seed 5 --overrides lr_fraction 0.65
for seed in 6 7; do
  train recognizer synthetic 50 --output "$run/cycle-$seed" --init "$run/weights" --workers 1 --warmup 40 \
    --learning-rate 7e-4 --seed "$seed" --overrides lr_fraction 0.65
done
python - "$run/weights" "$run"/cycle-{6,7}/weights <<'MEAN'
import sys
import torch
from difftsr.dataset import SyntheticLines, to_float
from difftsr.model import DiffTSR

models = [DiffTSR.from_pretrained(folder) for folder in sys.argv[1:]]
states = [model.recognizer.state_dict() for model in models]
model = models[0]
model.recognizer.load_state_dict({name: sum(state[name] for state in states) / len(states)
                                  if value.is_floating_point() else value for name, value in states[0].items()})
unseen = SyntheticLines(model.alphabet, model.config.image_size, length=96, seed=99, identity=0.0)
lines = unseen.batch([(index, 0) for index in range(96)])
with torch.no_grad():
    model.recognizer.eval().calibrate(to_float(lines["lr"]), lines["tokens"])
model.save(sys.argv[1])
MEAN
unset DIFFTSR_FONTS
# Mostly at the first time, and from the mean of its noise: a small model that takes one step learns that step.
train idm "pool:$run/pool" 39 --warmup 40 --learning-rate 1e-3 --seed 22 \
  --overrides first 0.75 temperature 0 ocr_weight 0
# One step and its decoder learn to be sharp; then to draw what they are told, first where only the text can help, and
# then everywhere, with texts as they are read, sharper still.
train few-step "pool:$run/pool" 58 --warmup 40 --learning-rate 4e-4 --ema 0.99 --seed 23 --overrides ocr_weight 0
train few-step "pool:$run/severe" 36 --warmup 20 --learning-rate 6e-4 --ema 0.98 --seed 61 \
  --overrides max_steps 1 columns 16 ocr_lines 8 decoder false jitter 0.004 text_mix 0.1,0.75,0.1,0.05
train few-step "pool:$run/pool" 120 --warmup 20 --learning-rate 4e-4 --ema 0.98 --seed 62 \
  --overrides max_steps 2 jitter 0.004 text_mix 0.35,0.45,0.1,0.1 lpips 1.0
train tdm "pool:$run/pool" 30 --cache "$(of 20000 | cut -d. -f1)" --warmup 20 --batch-size 32 --ema 0.98 --seed 31 \
  --overrides text_mix 0.8,0.1,0.05,0.05
train mom "pool:$run/pool" 7 --warmup 20 --batch-size 8 --ema 0.98 --seed 32

# What the text diffusion learned it learned from words of the training; the reading counts for more than it found there
# (its own trust came to .55, with which it made 14 lines of data/eval/dev worse and 4 better). Then the gate's certainty.
python - "$run/weights" <<'TRUST'
import sys
from difftsr.model import DiffTSR

model = DiffTSR.from_pretrained(sys.argv[1])
model.tdm.trust.data.fill_(1.655)
model.save(sys.argv[1])
TRUST
python -m difftsr.certainty --weights "$run/weights" --output "$run/certainty.json"
