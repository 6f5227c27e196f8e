# shellcheck shell=bash
# dpdk/: DPDK's testpmd with what it needs, unpacked and not installed: the package would pull in 170 MB and
# newer versions of half the system. Sourced by tests/lab/assets, after kernel.sh.

# The packages: testpmd's own, what it depends on but for headers, the drivers for either end of vhost-user, and
# what their libraries need that a small Debian may lack.
dpdk_packages() {
    printf '%s\n' dpdk-dev libmd0 libnl-3-200 libnl-route-3-200 libdbus-1-3
    apt-cache "${APT[@]}" depends --no-recommends --no-suggests --no-breaks --no-conflicts --no-replaces dpdk-dev |
        awk '/Depends:/ && $2 !~ /^(libdpdk-dev|python3|libc6|<)/ { print $2 }'
    apt-cache "${APT[@]}" search --names-only '^librte-(net-virtio|net-vhost|vhost|mempool-ring)[0-9]+$' | cut -d' ' -f1
}

build_dpdk() {
    local package packages deb=$WORK/deb lib=$WORK/dpdk/lib lacking
    refresh_lists
    mapfile -t packages < <(dpdk_packages | sort -u)
    mkdir -p "$deb/root" "$lib"
    (cd "$deb" && apt-get "${APT[@]}" -qq -o APT::Sandbox::User=root download "${packages[@]}")
    for package in "$deb"/*.deb; do dpkg-deb -x "$package" "$deb/root"; done
    mv "$deb/root/usr/bin/dpdk-testpmd" "$WORK/dpdk/"
    find "$deb/root" -type f -name '*.so*' -exec cp -t "$lib" {} +
    rm -rf "$deb"
    # Links the names that programs ask for to the files.
    /sbin/ldconfig -n "$lib"
    ln -s "$(cd "$lib" && ls librte_net_virtio.so.*.*)" "$lib/driver.so"
    ln -s "$(cd "$lib" && ls librte_net_vhost.so.*.*)" "$lib/vhost.so"
    ln -s "$(cd "$lib" && ls librte_mempool_ring.so.*.*)" "$lib/mempool.so"
    lacking=$(LD_LIBRARY_PATH=$lib ldd "$WORK/dpdk/dpdk-testpmd" "$lib"/{driver,vhost,mempool}.so | grep 'not found') || true
    [ -z "$lacking" ] || die "DPDK's testpmd lacks: $lacking"
}
