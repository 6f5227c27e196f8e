# shellcheck shell=bash
# trixie/: virtiofsd and a passt with --vhost-user, which Debian has from trixie on: unpacked with the libraries
# they need and the loader, and not installed. bin/PROGRAM runs them. Where trixie cannot be had, the file
# 'absent' says why. Sourced by tests/lab/assets, after qemu-blkio.sh, which has use_trixie.

TRIXIE_PACKAGES=(virtiofsd passt libc6 libgcc-s1 libcap-ng0 libseccomp2)

fetch_trixie() {
    apt-get "${NEXT[@]}" -qq update && (cd "$1" && apt-get "${NEXT[@]}" -qq download "${TRIXIE_PACKAGES[@]}")
}

build_trixie() {
    local deb=$WORK/deb to=$WORK/trixie package program lacking
    mkdir -p "$deb/root" "$to/bin" "$to/lib" "$to/programs"
    use_trixie
    if ! fetch_trixie "$deb"; then
        printf 'trixie, which has virtiofsd and passt with --vhost-user, cannot be fetched' >"$to/absent"
        rm -r "$deb"
        return
    fi
    for package in "$deb"/*.deb; do dpkg-deb -x "$package" "$deb/root"; done
    mv "$deb/root/usr/libexec/virtiofsd" "$deb/root/usr/bin/passt" "$to/programs/"
    find "$deb/root" -type f -name '*.so*' -not -path '*/gconv/*' -exec cp -t "$to/lib" {} +
    rm -rf "$deb"
    /sbin/ldconfig -n "$to/lib"
    for program in virtiofsd passt; do
        lacking=$("$to/lib/ld-linux-x86-64.so.2" --library-path "$to/lib" --list "$to/programs/$program" |
            grep 'not found') || true
        [ -z "$lacking" ] || die "$program lacks: $lacking"
        # shellcheck disable=SC2016 # the script's own variables
        printf '#!/bin/sh\nhere=$(dirname "$0")/..\nexec "$here/lib/ld-linux-x86-64.so.2" --library-path "$here/lib" --argv0 %s "$here/programs/%s" "$@"\n' \
            "$program" "$program" >"$to/bin/$program"
        chmod 755 "$to/bin/$program"
    done
}
