"""Other registration programs as they ship, with what their manuals recommend for rigid, multimodal pairs.

None but SimpleITK is tuned here. Each is imported in the process of its case, and only SimpleITK is a dependency. All
of them map fixed to moving points; only the world differs: greedy's is RAS.

=================  ==========================================================================================
`elastix`          AdvancedMattesMutualInformation, adaptive stochastic gradient descent, 4 resolutions, centres of
                   gravity first (its manual, chapters 5 and 6)
`ants`             type "Rigid" of ANTsPy: Mattes, centres of mass first
`ants-multistart`  ``antsAffineInitializer`` over all directions on voxels of 4 mm, then the same
`greedy`           NMI, 6 degrees of freedom, 100 x 50 x 10 iterations, image centres first
`greedy-search`    a random search of 1000 rotations (any) before it
`simpleitk`        Mattes, a tenth of the voxels, regular steps at 3 scales, centres of mass first (two tuning seeds)
=================  ==========================================================================================
"""

from __future__ import annotations

from typing import Any

import numpy as np
import SimpleITK as sitk

from comir_hpc.errors import RegistrationError
from comir_hpc.recipes.benchmark.methods import Found, Method, Task
from comir_hpc.space.grid import FloatArray
from comir_hpc.transforms.itk import from_itk

_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
_SEARCHED = 1000  # rotations of greedy's random search
_SEARCH_SHIFT_MM = 20  # standard deviation of its shifts, in mm
_ANTS_SEARCH_DEG = 20  # step of the search of ANTs
_ANTS_SEARCH_MM = 4.0  # voxels that it is done on
_ITERATIONS = "100x50x10"

_ELASTIX = {
    "Metric": ["AdvancedMattesMutualInformation"],
    "NumberOfHistogramBins": ["32"],
    "Optimizer": ["AdaptiveStochasticGradientDescent"],
    "AutomaticParameterEstimation": ["true"],
    "AutomaticScalesEstimation": ["true"],
    "AutomaticTransformInitialization": ["true"],
    "AutomaticTransformInitializationMethod": ["CenterOfGravity"],
    "MaximumNumberOfIterations": ["500"],
    "ImageSampler": ["RandomCoordinate"],
    "NumberOfSpatialSamples": ["2048"],
    "NewSamplesEveryIteration": ["true"],
    "WriteResultImage": ["false"],
}
_ELASTIX_RESOLUTIONS = 4


def elastix(task: Task) -> Found:
    """Register with elastix, by its own default parameters for rigid transforms and the changes above."""
    import itk

    parameters = itk.ParameterObject.New()
    chosen = parameters.GetDefaultParameterMap("rigid", _ELASTIX_RESOLUTIONS)
    for name, value in {**_ELASTIX, "RandomSeed": [str(task.seed)]}.items():
        chosen[name] = value
    parameters.AddParameterMap(chosen)
    images = [itk.imread(str(path), itk.F) for path in (task.fixed, task.moving)]
    _, found = itk.elastix_registration_method(
        *images,
        parameter_object=parameters,
        log_to_console=False,
        number_of_threads=task.threads,
        output_directory=str(task.folder),
    )
    result = found.GetParameterMap(0)
    return Found(_euler(dict(result)))


def _euler(result: dict[str, Any]) -> FloatArray:
    """Read elastix's rotation by three angles about a centre."""
    if result["Transform"][0] != "EulerTransform":
        raise RegistrationError(f"elastix returned {result['Transform'][0]}, expected EulerTransform")
    numbers = [float(v) for v in result["TransformParameters"]]
    transform = sitk.Euler3DTransform()
    transform.SetComputeZYX(result.get("ComputeZYX", ("false",))[0] == "true")
    transform.SetCenter([float(v) for v in result["CenterOfRotationPoint"]])
    transform.SetParameters(numbers)
    return from_itk(transform).matrix_mm


def ants_default(task: Task) -> Found:
    """Register with ANTs."""
    return _ants(task, None)


def ants_multistart(task: Task) -> Found:
    """Search all directions with ANTs' own multi-start, then register with ANTs."""
    import ants

    images = [ants.image_read(str(path)) for path in (task.fixed, task.moving)]
    coarse = [ants.resample_image(image, (_ANTS_SEARCH_MM,) * 3, False, 0) for image in images]
    start = ants.affine_initializer(
        *coarse,
        search_factor=_ANTS_SEARCH_DEG,
        radian_fraction=1.0,
        local_search_iterations=10,
        txfn=str(task.folder / "start.mat"),
    )
    return _ants(task, start)


def _ants(task: Task, start: str | None) -> Found:
    import ants

    fixed, moving = (ants.image_read(str(path)) for path in (task.fixed, task.moving))
    found = ants.registration(
        fixed,
        moving,
        type_of_transform="Rigid",
        initial_transform=start,
        outprefix=str(task.folder / "ants"),
        # To ANTs a seed of 0 means none.
        random_seed=task.seed + 1,
    )
    matrix = np.eye(4)
    # The list is in the order in which ANTs is told them: the last one is applied to a fixed point last.
    for file in found["fwdtransforms"]:
        matrix = from_itk(sitk.ReadTransform(str(file))).matrix_mm @ matrix
    return Found(matrix)


def greedy_default(task: Task) -> Found:
    """Register with greedy."""
    return _greedy(task, "")


def greedy_search(task: Task) -> Found:
    """Register with greedy, after a random search over all rotations."""
    return _greedy(task, f" -search {_SEARCHED} any {_SEARCH_SHIFT_MM}")


def _greedy(task: Task, more: str) -> Found:
    from picsl_greedy import Greedy3D

    images = {
        name: sitk.ReadImage(str(path), sitk.sitkFloat32)
        for name, path in (("fixed", task.fixed), ("moving", task.moving))
    }
    program = Greedy3D()
    program.execute(
        f"-i fixed moving -a -dof 6 -m NMI -ia-image-centers{more} -n {_ITERATIONS} -threads {task.threads} -o answer",
        **images,
        answer=None,
    )
    return Found(_RAS @ np.asarray(program["answer"], dtype=np.float64) @ _RAS)


def simpleitk(task: Task) -> Found:
    """Register with SimpleITK's mutual information.

    The settings of its introductory notebook (1 % of the voxels, plain gradient descent, centres of the grids) ended
    further off than they began on seeds 500 and 501 of the embedded pair. These were found there (docs/log.md).
    """
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(task.threads)
    fixed, moving = (sitk.ReadImage(str(path), sitk.sitkFloat32) for path in (task.fixed, task.moving))
    start = sitk.CenteredTransformInitializer(
        fixed, moving, sitk.Euler3DTransform(), sitk.CenteredTransformInitializerFilter.MOMENTS
    )
    way = sitk.ImageRegistrationMethod()
    way.SetMetricAsMattesMutualInformation(numberOfHistogramBins=50)
    way.SetMetricSamplingStrategy(way.RANDOM)
    way.SetMetricSamplingPercentage(0.1, task.seed + 1)
    way.SetInterpolator(sitk.sitkLinear)
    way.SetOptimizerAsRegularStepGradientDescent(learningRate=1.0, minStep=1e-3, numberOfIterations=200)
    way.SetOptimizerScalesFromPhysicalShift()
    way.SetShrinkFactorsPerLevel([4, 2, 1])
    way.SetSmoothingSigmasPerLevel([2, 1, 0])
    way.SmoothingSigmasAreSpecifiedInPhysicalUnitsOn()
    way.SetInitialTransform(start, inPlace=False)
    try:
        found = way.Execute(fixed, moving)
    except RuntimeError as error:
        raise RegistrationError(_reason(error)) from error
    return Found(from_itk(found).matrix_mm)


def _reason(error: RuntimeError) -> str:
    """Take ITK's own sentence out of its report."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else "ITK gave no reason"


def _install(package: str) -> str:
    return (
        f"`pip install --target peers '{package}'`, and `peers: peers` in the settings of the benchmark (or pip "
        "install 'comir-hpc[peers]')"
    )


_ALL = (
    Method(
        "elastix",
        elastix,
        f"rigid, Mattes 32 bins, ASGD 500 x {_ELASTIX_RESOLUTIONS}, 2048 samples, centres of gravity",
        "itk",
        _install("itk-elastix>=0.23"),
        40.0,
    ),
    Method("ants", ants_default, "type Rigid, defaults", "ants", _install("antspyx>=0.5"), 60.0),
    Method(
        "ants-multistart",
        ants_multistart,
        f"antsAffineInitializer every {_ANTS_SEARCH_DEG} degrees on {_ANTS_SEARCH_MM:g} mm, then type Rigid",
        "ants",
        _install("antspyx>=0.5"),
        300.0,
    ),
    Method(
        "greedy",
        greedy_default,
        f"-a -dof 6 -m NMI -ia-image-centers -n {_ITERATIONS}",
        "picsl_greedy",
        _install("picsl-greedy>=0.0.6"),
        30.0,
    ),
    Method(
        "greedy-search",
        greedy_search,
        f"-search {_SEARCHED} any {_SEARCH_SHIFT_MM}, then as greedy",
        "picsl_greedy",
        _install("picsl-greedy>=0.0.6"),
        120.0,
    ),
    Method(
        "simpleitk",
        simpleitk,
        "Mattes 50 bins, 10 % random samples, regular steps at 3 scales, centres of mass",
        typical_s=15.0,
    ),
)
PEER_METHODS: dict[str, Method] = {one.name: one for one in _ALL}
"""Every peer, by name."""
