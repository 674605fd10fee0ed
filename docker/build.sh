#!/bin/sh
# Builds the image without a Docker engine, on a base made by debootstrap, and samples in it: `make container`.
# Needs root, buildah, debootstrap, and disk for some copies of what pip installs (7 GB with CUDA).
# BUILD_OPTIONS: further options of `buildah bud`, such as --secret id=pip.conf,src=$HOME/.config/pip/pip.conf
set -eu
cd "$(dirname "$0")/.."
export STORAGE_DRIVER=vfs BUILDAH_ISOLATION=chroot
base=localhost/lcm-base
output=$PWD/outputs/container

if ! buildah inspect --type image $base > /dev/null 2>&1; then
    root=$(mktemp -d)
    debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates bookworm "$root"
    container=$(buildah from scratch)
    buildah add --quiet "$container" "$root" /
    buildah commit --quiet --rm "$container" $base
    rm -rf "$root"
fi
# shellcheck disable=SC2086 - options are words
buildah bud --network host --build-arg BASE_IMAGE=$base ${BUILD_OPTIONS:-} --file docker/Dockerfile --tag lcm .

rm -rf "$output"
install -d -o 1000 -g 1000 "$output"
container=$(buildah from lcm)
trap 'buildah rm "$container" > /dev/null' EXIT
buildah run --volume "$output:/workspace" "$container" -- sh -c 'test "$(id -u)" = 1000 && test ! -w /opt/lcm'
buildah run --volume "$output:/workspace" "$container" -- lcm sample pipeline=mini prompts='red apple' images_per_prompt=1 output=.
ls -l "$output"
