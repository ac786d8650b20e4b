#!/usr/bin/env bash
# Build the Apptainer image of the commit that is checked out; see README.md beside this.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(dirname "$here")

usage() {
  cat <<TEXT
usage: $0 [--cpu] [--base docker|debootstrap] [--wheels DIR] [--notest] [OUT.sif]

  --cpu          torch without CUDA: a small image, for tests and CPU clusters (with --wheels only, see below)
  --base KIND    docker: Debian's image from Docker Hub; debootstrap: Debian's packages from this machine's mirror.
                 When not given, docker where its registry answers, debootstrap otherwise.
  --wheels DIR   collect the Python packages in DIR with this machine's pip (its index, its cache) and install from
                 there; otherwise the build takes them from PyPI, by the hashes of requirements.lock.
  --notest       do not run the image's own test at the end; \`apptainer test OUT.sif\` runs it
  OUT.sif        default: comir.sif
TEXT
}
die() { printf '%s\n' "$*" >&2; exit 2; }

base='' cpu='' wheels='' out=comir.sif flags=(--force)
while [ $# -gt 0 ]; do
  case $1 in
    --cpu) cpu=1 ;;
    --base) base=${2:?--base needs docker or debootstrap}; shift ;;
    --wheels) wheels=${2:?--wheels needs a folder}; shift ;;
    --notest) flags+=(--notest) ;;
    -h|--help) usage; exit 0 ;;
    -*) usage >&2; exit 2 ;;
    *) out=$1 ;;
  esac
  shift
done

command -v apptainer >/dev/null || die "apptainer is not on PATH (1.2 or newer is needed; https://apptainer.org)"
git -C "$root" rev-parse --verify -q HEAD >/dev/null || die "$root is no git checkout: the image carries the commit's number"
[ -z "$cpu" ] || [ -n "$wheels" ] ||
  die "--cpu needs --wheels: PyPI has no torch without CUDA, but your pip may be set up to find one (--find-links, --extra-index-url)"
if [ -z "$base" ]; then
  if curl -s -o /dev/null --max-time 10 https://registry-1.docker.io/v2/; then base=docker; else base=debootstrap; fi
fi
case $base in
  docker) ;;
  debootstrap) command -v debootstrap >/dev/null || die "debootstrap is not on PATH; install it, or use --base docker" ;;
  *) die "--base $base: expected docker or debootstrap" ;;
esac

inputs=$(mktemp -d)
trap 'rm -rf "$inputs"' EXIT
mkdir "$inputs/source"
git -C "$root" archive HEAD | tar -x -C "$inputs/source"
lock=$inputs/source/containers/requirements.lock
if [ -n "$cpu" ]; then
  # The same versions without CUDA: names and versions only, since this torch has another hash.
  sed -nE '/^(nvidia-|cuda-|triton)/d; s/^(torch==[^ ]+).*/\1+cpu/; s/^([a-z0-9._-]+==[^ ]+).*/\1/p' "$lock" > "$inputs/requirements.txt"
else
  cp "$lock" "$inputs/requirements.txt"
fi
if [ -n "$wheels" ]; then
  python=$(command -v python3.11) || die "--wheels needs python3.11 here, the version that the image has"
  mkdir -p "$wheels"
  # hatchling builds our own package.
  "$python" -m pip wheel -qq --find-links "$wheels" -w "$wheels" -r "$inputs/requirements.txt" "hatchling>=1.27"
  mkdir "$inputs/wheels"
  # Where this machine has uv, it installs them: the build takes a sixth less of processor time. Not from an index, since uv
  # does not read pip's settings of a site.
  ! command -v uv >/dev/null || cp "$(command -v uv)" "$inputs/uv"
fi

mirror=http://deb.debian.org/debian
if command -v apt-get >/dev/null; then
  # shellcheck disable=SC2016  # apt-get's own variable
  mirror=$(apt-get indextargets --format '$(REPO_URI)' 2>/dev/null | grep -m 1 '/debian/$' || echo "$mirror")
fi
commit=$(git -C "$root" rev-parse --short=12 HEAD)
[ -z "$(git -C "$root" status --porcelain --untracked-files=no)" ] ||
  echo "note: changes that are not committed are not in the image" >&2

# Root may do without, unless it is a container's root that may not raise limits (CAP_SYS_RESOURCE, bit 24).
capabilities=$(sed -n 's/^CapEff:[[:space:]]*//p' /proc/self/status)
[ "$(id -u)" -eq 0 ] && (( 0x$capabilities >> 24 & 1 )) || flags+=(--fakeroot)
flags+=(--mksquashfs-args '-comp zstd -Xcompression-level 3')
from=debian:bookworm-20250520-slim
if [ "$base" = debootstrap ]; then
  # In a build of its own: once it has run debootstrap, Apptainer 1.4 keeps a core busy with nothing until the build ends.
  base=localimage from=$inputs/debian.sif
  apptainer build "${flags[@]}" --build-arg MIRROR="$mirror" "$from" "$here/debian.def"
fi
binds=$inputs:/mnt:ro${wheels:+,$(realpath "$wheels"):/mnt/wheels:ro}
apptainer build "${flags[@]}" --bind "$binds" \
  --build-arg BOOTSTRAP="$base" --build-arg FROM="$from" --build-arg COMMIT="$commit" \
  --build-arg VERSION="$(sed -n 's/^version = "\(.*\)"/\1/p' "$inputs/source/pyproject.toml")" \
  "$out" "$here/comir.def"
