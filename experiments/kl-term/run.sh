#!/usr/bin/env bash
# Trains DPO, TDPO1 and TDPO2 from one SFT model per seed and evaluates them on held-out pairs.
#
#   MODEL=stories260k DATA=folder ./run.sh
#
# DATA has train.jsonl and test.jsonl: Anthropic HH (harmless-base test), split by prompt. Results: $DATA/<objective>-<seed>.json
set -euo pipefail
cd "$DATA"
common=(--max_length 192 --per_device_train_batch_size 16 --max_steps 100 --save_strategy no --report_to none --on_bad_row drop)
for seed in 0 1 2; do
    tdpo sft --model_name_or_path "$MODEL" --dataset_name train.jsonl --output_dir "sft-$seed" --learning_rate 1e-3 --seed "$seed" "${common[@]}"
    for objective in dpo tdpo1 tdpo2; do
        tdpo train --model_name_or_path "sft-$seed" --dataset_name train.jsonl --output_dir "$objective-$seed" \
            --objective "$objective" --beta 0.1 --learning_rate 5e-4 --seed "$seed" "${common[@]}"
        tdpo eval --model_name_or_path "$objective-$seed" --ref_model_name_or_path "sft-$seed" --dataset_name test.jsonl \
            --objective "$objective" --beta 0.1 --max_length 192 --on_bad_row drop --json "$objective-$seed.json"
    done
done
