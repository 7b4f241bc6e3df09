# Makes the folders of shards that next.jsonl names, unless they are there, in bash:
#
#     . benchmarks/plans/data.sh DOCS TOKENIZER OUT [WIDE]
#
# DOCS: folder with docs_train.jsonl.xz and docs_val.jsonl.xz and, for LONG_DATA, docs_more_1.jsonl.xz
# and docs_more_2.jsonl.xz; TOKENIZER: the published model; OUT: folder of the datasets; WIDE: a model
# of 16,384 pieces (tokenizers/README.md). Sourced from the root of the repository, it sets PROXY_DATA,
# OWN_DATA, SECOND_DATA and LONG_DATA, and with WIDE also WIDE_DATA and WIDE_TOKENIZER. Fails unless
# all folders were made; a folder that is there is kept, so OUT should be new where DOCS are others.
docs=$1
published=$2
out=${3:?usage: . benchmarks/plans/data.sh DOCS TOKENIZER OUT [WIDE]}
wide=${4:-}
export PROXY_DATA=$out/proxy OWN_DATA=$out/own SECOND_DATA=$out/second LONG_DATA=$out/long
mkdir -p "$out"
folders=()

make_data() { # FOLDER VAL TRAIN... [--tokenizer MODEL], in the background
    local folder=$1 val=$2
    shift 2
    folders+=("$folder")
    [ -e "$folder/manifest.json" ] ||
        python benchmarks/bench_recipe.py data "$folder" --val "$val" --train "$@" > "$folder.log" 2>&1 ||
        echo "$folder: see $folder.log" &
}

# of documents 501 to 1,000 only the validation counts: a few behind them stand in for training
xz -dc "$docs/docs_val.jsonl.xz" | sed -n '501,1000p' > "$out/second.jsonl"
xz -dc "$docs/docs_val.jsonl.xz" | sed -n '1001,1300p' > "$out/few.jsonl"
make_data "$SECOND_DATA" "$out/second.jsonl" "$out/few.jsonl"
make_data "$OWN_DATA" "$docs"/docs_val.jsonl.xz "$docs"/docs_train.jsonl.xz
make_data "$PROXY_DATA" "$docs"/docs_val.jsonl.xz "$docs"/docs_train.jsonl.xz --tokenizer "$published"
if [ -n "$wide" ]; then
    export WIDE_DATA=$out/wide WIDE_TOKENIZER=$wide
    make_data "$WIDE_DATA" "$docs"/docs_val.jsonl.xz "$docs"/docs_train.jsonl.xz --tokenizer "$wide"
fi
if [ -e "$docs/docs_more_2.jsonl.xz" ]; then
    make_data "$LONG_DATA" "$docs"/docs_val.jsonl.xz "$docs"/docs_train.jsonl.xz "$docs"/docs_more_[12].jsonl.xz \
        --tokenizer "$published"
fi
wait
ls "${folders[@]/%//manifest.json}" > /dev/null
