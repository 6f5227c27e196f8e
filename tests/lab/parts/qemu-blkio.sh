# shellcheck shell=bash
# qemu-blkio/: qemu-img and qemu-io with libblkio's drivers, where the installed QEMU is built without them
# (bookworm's): unpacked from trixie with the libraries they need and the loader, and not installed.
# Where trixie cannot be had, the file 'absent' says why. Sourced by tests/lab/assets, after kernel.sh.

# Sets NEXT to apt-get's options for trixie on the machine's mirror, as if nothing were installed.
use_trixie() {
    local apt=$LAB_DIR/apt/trixie
    mkdir -p "$apt/lists/partial" "$apt/archives/partial"
    : >"$apt/status"
    copy_source "$SUITE" trixie >"$apt/debian.sources"
    NEXT=("${APT[@]}" -o "Dir::Etc::sourcelist=$apt/debian.sources" -o "Dir::State::lists=$apt/lists"
        -o "Dir::State::status=$apt/status" -o "Dir::Cache::archives=$apt/archives"
        -o Dir::Cache::pkgcache= -o Dir::Cache::srcpkgcache= -o APT::Sandbox::User=root)
}

# Fetches the packages into $1.
fetch_qemu_blkio() {
    local packages
    apt-get "${NEXT[@]}" -qq update || return
    # The other block drivers' libraries are many times as large as all this, and of no use here.
    mapfile -t packages < <(apt-get "${NEXT[@]}" -s install --no-install-recommends qemu-utils |
        awk '$1 == "Inst" && $2 ~ /^(lib|qemu-utils$)/ { print $2 }')
    (cd "$1" && apt-get "${NEXT[@]}" -qq download qemu-block-extra libblkio1 "${packages[@]}")
}

build_qemu-blkio() {
    local deb=$WORK/deb to=$WORK/qemu-blkio package lacking
    mkdir -p "$deb/root" "$to/lib" "$to/modules"
    [ ! -e /usr/lib/x86_64-linux-gnu/qemu/block-blkio.so ] || { rm -r "$deb" && return; }
    use_trixie
    if ! fetch_qemu_blkio "$deb"; then
        printf 'trixie, whose qemu-img has libblkio, cannot be fetched' >"$to/absent"
        rm -r "$deb"
        return
    fi
    for package in "$deb"/*.deb; do dpkg-deb -x "$package" "$deb/root"; done
    mv "$deb"/root/usr/bin/{qemu-img,qemu-io} "$to/"
    mv "$deb"/root/usr/lib/x86_64-linux-gnu/qemu/block-blkio.so "$to/modules/"
    find "$deb/root" -type f -name '*.so*' -not -path '*/gconv/*' -not -path '*/qemu/*' -exec cp -t "$to/lib" {} +
    rm -rf "$deb"
    /sbin/ldconfig -n "$to/lib"
    lacking=$("$to/lib/ld-linux-x86-64.so.2" --library-path "$to/lib" --list "$to/modules/block-blkio.so" |
        grep 'not found') || true
    [ -z "$lacking" ] || die "qemu-img lacks: $lacking"
}
