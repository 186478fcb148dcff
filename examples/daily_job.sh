#!/usr/bin/env bash
# A daily job: fold yesterday's log into the features, embed what changed, rebuild, and let the running server swap by itself.
# Every step is resumable and publishes all or nothing: run the script again after a crash. Retrain monthly with `omni train`.
#   0 3 * * *  DATA=/data/search STORE=/data/store BUNDLE=/data/models/current /opt/omni/examples/daily_job.sh
set -euo pipefail
: "${DATA:?folder with catalogue.parquet and logs/YYYY-MM-DD.parquet}" "${STORE:?release store}" "${BUNDLE:?model bundle}"
day=${DAY:-$(date -u -d yesterday +%F)}

omni data validate "$DATA/logs/$day.parquet" --table log
create=(); [ -d "$DATA/engaged_queries" ] || create=(--create)  # the first day makes the state
omni enrich queries --state "$DATA/engaged_queries" "${create[@]}" --log "$DATA/logs/$day.parquet" --catalogue "$DATA/catalogue.parquet" --out "$DATA/enriched.parquet"
omni rebuild --store "$STORE" --bundle "$BUNDLE" --catalogue "$DATA/enriched.parquet" --queries "$DATA/frequent_queries.txt"
omni release gc --store "$STORE" --keep 7
