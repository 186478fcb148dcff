#!/usr/bin/env bash
# A daily job: fold yesterday's log and the boards into the features, embed what changed, rebuild, and let the running server swap by itself.
# Every step is resumable and publishes all or nothing: run the script again after a crash. Retrain monthly with `omni train`.
#   0 3 * * *  DATA=/data/search STORE=/data/store BUNDLE=/data/models/current /opt/omni/examples/daily_job.sh
# The first run fills the engaged queries from HISTORY (a log file or folder; default: all of DATA/logs), every run adds one day. Catch a missed
# day up with DAY=YYYY-MM-DD. No event counts twice: to read a longer HISTORY later, remove DATA/engaged_queries.filled.
set -euo pipefail
: "${DATA:?folder with catalogue.parquet, logs/YYYY-MM-DD.parquet and, if there are any, boards.parquet}" "${STORE:?release store}" "${BUNDLE:?model bundle}"
day=${DAY:-$(date -u -d yesterday +%F)}
catalogue=$DATA/catalogue.parquet

omni data validate "$DATA/logs/$day.parquet" --table log
if [ -e "$DATA/boards.parquet" ]; then  # without boards the catalogue keeps the board_titles that it brings
  omni enrich boards --catalogue "$catalogue" --boards "$DATA/boards.parquet" --out "$DATA/with_boards.parquet"
  catalogue=$DATA/with_boards.parquet
fi
if [ ! -e "$DATA/engaged_queries.filled" ]; then  # the first run: what happened before yesterday counts too
  create=(); [ -e "$DATA/engaged_queries/state.db" ] || create=(--create)
  omni enrich queries --state "$DATA/engaged_queries" "${create[@]}" --log "${HISTORY:-$DATA/logs}"
  touch "$DATA/engaged_queries.filled"
fi
omni enrich queries --state "$DATA/engaged_queries" --log "$DATA/logs/$day.parquet" --catalogue "$catalogue" --out "$DATA/enriched.parquet"
if [ -e "$DATA/enriched.parquet" ]; then  # its data is as old as what it was made of: later live writes win
  touch -r "$DATA/catalogue.parquet" "$DATA/enriched.parquet"
fi
omni rebuild --store "$STORE" --bundle "$BUNDLE" --catalogue "$DATA/enriched.parquet" --queries "$DATA/frequent_queries.txt"
omni release gc --store "$STORE" --keep 7
