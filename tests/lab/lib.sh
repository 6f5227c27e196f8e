# shellcheck shell=bash
# What the lab's scripts share: paths, messages, and Debian's package source.
#
# Sourced, never run. Nothing here changes the machine's own apt configuration: every apt command
# reads one file that we derive from the machine's Debian entry, so other entries, reachable or not,
# play no part.

LAB_SRC=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
REPO=$(cd "$LAB_SRC/../.." && pwd)
LAB_DIR=${BERTH_LAB_DIR:-$REPO/target/lab}
export DEBIAN_FRONTEND=noninteractive LC_ALL=C.UTF-8

say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }
die() { say "error: $*"; exit 1; }

# Seconds since the script started, for progress lines.
step() { printf '%s: [%3ds] %s\n' "${0##*/}" "$SECONDS" "$*" >&2; }

need_root() { [ "$(id -u)" = 0 ] || die "$1 needs root: run it as root or with sudo"; }

# The release's code name: bookworm, trixie, …
codename() {
    # shellcheck source=/dev/null
    (. /etc/os-release && [ "${ID:-}" = debian ] && printf '%s' "${VERSION_CODENAME:-}")
}

# The suite that has QEMU 10 and a 6.12 kernel: bookworm's backports, later releases as they are.
newer_suite() {
    case $1 in
        bookworm) printf 'bookworm-backports' ;;
        *) printf '%s' "$1" ;;
    esac
}

# Prints apt sources for suite $2, copied from the machine's entry for suite $1 (either format).
copy_source() {
    local from=$1 to=$2 file
    for file in /etc/apt/sources.list.d/*.sources; do
        [ -f "$file" ] || continue
        awk -v from="$from" -v to="$to" '
            function flush(   i, n, suites) {
                n = split(suite_line, suites, /[ \t]+/)
                for (i = 2; i <= n; i++) if (suites[i] == from && !off) hit = 1
                if (hit) printf "%sSuites: %s\n\n", text, to
                text = ""; suite_line = ""; hit = 0; off = 0
            }
            /^#/ { next }
            /^[ \t]*$/ { flush(); next }
            tolower($1) == "suites:" { suite_line = $0; next }
            tolower($1) == "types:" { $0 = "Types: deb" }
            tolower($1) == "enabled:" && tolower($2) == "no" { off = 1 }
            { text = text $0 "\n" }
            END { flush() }' "$file"
    done
    for file in /etc/apt/sources.list /etc/apt/sources.list.d/*.list; do
        [ -f "$file" ] || continue
        sed -nE "s/^deb[ \t]+\[([^]]*)\][ \t]+([^ \t]+)[ \t]+${from}[ \t]+(.*)$/\1|\2|\3/p;
                 s/^deb[ \t]+([^[ \t]+)[ \t]+${from}[ \t]+(.*)$/|\1|\2/p" "$file" |
            while IFS='|' read -r options uri components; do
                one_line_to_deb822 "$options" "$uri" "$to" "$components"
            done
    done
}

# One stanza from the parts of a one-line entry. Options become fields; only signed-by and trusted matter here.
one_line_to_deb822() {
    local option
    printf 'Types: deb\nURIs: %s\nSuites: %s\nComponents: %s\n' "$2" "$3" "${4%%#*}"
    for option in $1; do
        case $option in
            signed-by=*) printf 'Signed-By: %s\n' "${option#*=}" ;;
            trusted=*) printf 'Trusted: %s\n' "${option#*=}" ;;
        esac
    done
    printf '\n'
}

# Writes $LAB_DIR/apt/debian.sources and sets APT to apt-get's options for it, SUITE and NEWER.
use_debian_sources() {
    SUITE=$(codename) || true
    [ -n "$SUITE" ] || die "this needs Debian 12 or newer (see /etc/os-release)"
    NEWER=$(newer_suite "$SUITE")
    SOURCES=$LAB_DIR/apt/debian.sources
    mkdir -p "$LAB_DIR/apt"
    {
        copy_source "$SUITE" "$SUITE"
        [ "$SUITE" = "$NEWER" ] || copy_source "$SUITE" "$NEWER"
        copy_source "$SUITE-updates" "$SUITE-updates"
        copy_source "$SUITE-security" "$SUITE-security"
    } >"$SOURCES.$$"
    grep -q "^Suites: $NEWER\$" "$SOURCES.$$" ||
        die "no apt source for Debian's suite '$SUITE' in /etc/apt/sources.list or sources.list.d"
    mv "$SOURCES.$$" "$SOURCES"
    APT=(-o "Dir::Etc::sourcelist=$SOURCES" -o Dir::Etc::sourceparts=/dev/null
        -o APT::Get::List-Cleanup=0 -o Acquire::Retries=3 -o Dpkg::Use-Pty=0 -o DPkg::Lock::Timeout=300)
}

# Refreshes the package lists of our sources, at most once in ten hours unless $1 is 'now'.
refresh_lists() {
    local mark=$LAB_DIR/apt/updated
    if [ "${1:-}" != now ] && [ -n "$(find "$mark" -mmin -600 -newer "$LAB_SRC/lib.sh" 2>/dev/null)" ]; then
        return
    fi
    step "reading Debian's package lists ($SUITE, $NEWER)"
    apt-get "${APT[@]}" -qq update >&2 || die "apt-get update failed for $SOURCES"
    touch "$mark"
}
