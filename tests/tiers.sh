# shellcheck shell=bash
# The tiers of ./test, and how their results are counted. Sourced by ./test, in the repository's root.
#
# A tier is a function that writes to a log. Its results are the lines 'ok NAME …', 'FAILED NAME …' and
# 'skipped NAME …' in it, and for the unit tier also the summaries of nextest and cargo test. A tier that
# ends with an error and has no failed result counts as one failed.

fail_usage() {
    printf 'test: %s\n' "$*" >&2
    exit 2
}

# check NAME COMMAND...: one check of the static tier.
check() {
    local name=$1 start=$SECONDS
    shift
    if "$@"; then
        printf 'ok %s %ss\n' "$name" $((SECONDS - start))
    else
        printf 'FAILED %s %ss: %s\n' "$name" $((SECONDS - start)) "$*"
    fi
}

tier_prepare() {
    local tier assets=''
    tests/lab/install || return
    for tier in "$@"; do
        case $tier in client | lab | demo | perf) assets=yes ;; esac
    done
    [ -n "$assets" ] || return 0
    tests/lab/build || return
    tests/lab/assets
}

tier_static() {
    check fmt cargo fmt --all --check
    check clippy cargo clippy --quiet --workspace --all-targets --locked -- -D warnings
    check arrows cargo test --quiet --locked -p berth-tests-cases --test arrows
    RUSTDOCFLAGS='-D warnings -A rustdoc::private-intra-doc-links' check rustdoc cargo doc --quiet --workspace --no-deps --document-private-items --locked
    # A workspace of its own, which nothing else here compiles. Nothing is linked, so libFuzzer need not be built.
    CUSTOM_LIBFUZZER_PATH=/unbuilt/libfuzzer.a check fuzz-compiles cargo check --quiet --locked --all-targets \
        --manifest-path tests/fuzz/Cargo.toml --target-dir target
    check shell-syntax shell_syntax
}

# Every shell script of ours parses; where shellcheck is installed, it finds nothing.
shell_syntax() {
    local scripts
    mapfile -t scripts < <(git ls-files -co --exclude-standard | while read -r file; do
        head -n 1 "$file" | grep -qaE '^(#!/bin/bash|# shellcheck shell=bash)' && printf '%s\n' "$file"
    done)
    local script
    for script in "${scripts[@]}"; do bash -n "$script" || return 1; done
    if command -v shellcheck >/dev/null; then shellcheck -x "${scripts[@]}"; fi
}

# BERTH_FULL asks the tests themselves for their long form.
tier_unit() {
    [ -z "$FULL" ] || export BERTH_FULL=1
    local code=0
    if cargo nextest --version >/dev/null 2>&1; then
        limited 900 cargo nextest run --workspace --locked --no-fail-fast --no-tests=pass \
            --status-level=slow --final-status-level=fail ${FILTER:+"$FILTER"} || code=$?
        limited 300 cargo test --workspace --locked --no-fail-fast --doc ${FILTER:+"$FILTER"} || code=$?
    else
        limited 1200 cargo test --workspace --locked --no-fail-fast ${FILTER:+"$FILTER"} || code=$?
    fi
    return "$code"
}

tier_client() {
    limited 900 target/release/berth-cases --tier client --assets target/lab/assets --bin target/release \
        --patience 3 --out "$LOGS/client" ${FULL:+--full} ${FILTER:+--filter "$FILTER"}
}

# One boot of the lab's machine for all guest cases, or none where the host runs guests itself. What runs
# under emulation gets longer deadlines.
tier_lab() {
    local arguments=(--tier guest ${FULL:+--full} ${FILTER:+--filter "$FILTER"}) limit=2400
    [ -z "$FULL" ] || limit=7200
    if [ "$(tests/lab/where)" = host ]; then
        limited "$limit" target/release/berth-cases "${arguments[@]}" \
            --assets target/lab/assets --bin target/release --out "$LOGS/lab"
    else
        tests/lab/run --timeout "$limit" --out "$LOGS/lab" --programs -- \
            berth-cases "${arguments[@]}" --patience 3 --assets assets --bin bin --out out
    fi
}

# Half a minute of each target, ten with --full; a target for each core.
tier_fuzz() {
    if [ -n "$FULL" ]; then
        limited 10800 tests/fuzz/run --seconds 600 --jobs "$(nproc)"
    else
        limited 1500 tests/fuzz/run --seconds 30 --jobs "$(nproc)"
    fi
}

# The lab's own limit is the shorter one, so that it can say how far the machine came.
tier_demo() {
    BERTH_DEMO_TIMEOUT=840 check demo limited 900 ./demo
    [ -n "$FULL" ] || return 0
    BERTH_DEMO_TIMEOUT=1140 check demo-dedup limited 1200 ./demo --dedup
    check dedup-json target/release/berth-demo-dedup --check target/demo/dedup.json
}

# All scenarios in their short form, and what they leave behind. What a figure is, is no matter here. Those with
# guests take as long again where they need the lab, so that --full has them there.
tier_perf() {
    local run=$LOGS/perf without=() limit=480
    if [ -n "$FULL" ]; then
        limit=1200
    elif [ "$(tests/lab/where)" != host ]; then
        without=('--without=boot,overhead,exits')
    fi
    check quick limited "$limit" target/release/berth-perf run --quick "${without[@]}" --out "$run"
    check report target/release/berth-perf report "$run"
    check compare target/release/berth-perf compare "$run" "$run"
    check shape target/release/berth-perf report --check "$run"
}

# limited SECONDS COMMAND...: a deadline, so that nothing hangs. It stays in the tier's process group.
limited() { timeout --foreground --kill-after=20 "$@"; }

# follow PID LOG TIER: shows results and progress until the process ends.
follow() {
    local pattern='^(ok|FAILED|skipped) |^(install|assets|build|where|run|demo): |^ +Summary '
    [ "$3" != demo ] || pattern=''
    tail -n +1 -q -s 0.2 -F --pid="$1" "$2" 2>/dev/null | grep --line-buffered -aE "$pattern" || true
}

# count TIER LOG CODE: prints passed, failed and skipped.
count() {
    local ok bad left summary
    ok=$(grep -acE '^ok ' "$2") || true
    bad=$(grep -acE '^FAILED ' "$2") || true
    left=$(grep -acE '^skipped ' "$2") || true
    if [ "$1" = unit ]; then
        summary=$(unit_summary <"$2")
        read -r ok bad left <<<"$summary"
    fi
    if [ "$3" != 0 ] && [ "$bad" = 0 ]; then bad=1; fi
    printf '%d %d %d' "$ok" "$bad" "$left"
}

# Adds up nextest's 'N tests run: N passed, N failed, N skipped' and cargo test's 'test result:' lines.
unit_summary() {
    awk '
        function number_before(word,   at) {
            at = match($0, "[0-9]+ " word)
            return at ? substr($0, RSTART, RLENGTH) + 0 : 0
        }
        / tests? run: / { passed += number_before("passed"); failed += number_before("failed")
                          failed += number_before("timed out"); skipped += number_before("skipped") }
        /^test result: / { passed += number_before("passed"); failed += number_before("failed")
                           skipped += number_before("ignored") }
        END { print passed + 0, failed + 0, skipped + 0 }'
}

# The part of a failed tier's log that a person wants to see: the cases' own reports, or the end.
show_end() {
    printf -- '-- %s failed; from its log %s:\n' "$1" "$2"
    case $1 in
        client | lab) grep -aE '^FAILED |^  \| ' "$2" || tail -n 60 "$2" ;;
        *) tail -n 80 "$2" ;;
    esac
}
