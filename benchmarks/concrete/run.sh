#!/usr/bin/env bash
# X-ray and neutron tomography of one concrete sample, really misaligned (about 20 degrees), no aligned pair:
#
#   benchmarks/concrete/run.sh DATA WORK
#
# DATA holds concrete_x-ray-bin16.nii.gz, concrete_neutron-bin16.nii.gz and silver_xray_to_neutron_similarity.tfm (the
# volumes ship in the Python package spam==0.9.1; the silver transform is the agreement of the six best of 120 starts of
# mutual information). Two single starts of mutual information are tried first. The encoders train on the pair as the
# silver transform aligns it, and then register it from its real misalignment. One specimen: a first look.
set -euo pipefail
data=$1 work=$2
mkdir -p "$work"
comir-hpc ingest "$data/concrete_x-ray-bin16.nii.gz" "$work/xray.zarr"
comir-hpc ingest "$data/concrete_neutron-bin16.nii.gz" "$work/neutron.zarr"
for initial in identity global; do
  comir-hpc register --representation intensity --initial "$initial" --fixed "$work/xray.zarr" --moving "$work/neutron.zarr" \
    --out "$work/information_$initial" || true
done
comir-hpc warp --zarr "$work/neutron.zarr" --transform "$data/silver_xray_to_neutron_similarity.tfm" \
  --like "$work/xray.zarr" --out "$work/neutron_on_xray.zarr"
cat > "$work/concrete.yaml" <<YAML
modalities: [xray, neutron]
pairs:
  - {xray: xray.zarr, neutron: neutron_on_xray.zarr}
YAML
comir-hpc train "$work/concrete.yaml" --run "$work/run"
comir-hpc register --fixed "$work/xray.zarr" --moving "$work/neutron.zarr" --model "$work/run" \
  --fixed-modality xray --moving-modality neutron --out "$work/registration" || true
comir-hpc evaluate --result "$work/information_identity" --result "$work/information_global" --result "$work/registration" \
  --truth "$data/silver_xray_to_neutron_similarity.tfm" --out "$work/concrete.csv"
