//! What tests of GPU memory run on: the stand-in for libcuda, or with `PD_TEST_GPU=1` the machine's own GPU.

use std::path::{Path, PathBuf};
use std::process::Command;

/// Whether the machine's own GPU is to be used.
pub fn is_real() -> bool {
    std::env::var("PD_TEST_GPU").as_deref() == Ok("1")
}

/// What makes a process see a GPU. `state` is an empty folder that outlives it.
pub fn environment(state: &Path) -> Vec<(String, String)> {
    if is_real() {
        return Vec::new();
    }
    let variable = |name: &str, value: &Path| (name.to_owned(), value.to_string_lossy().into_owned());
    vec![variable("LD_LIBRARY_PATH", &stand_in()), variable("PD_FAKE_CUDA_DIR", state)]
}

/// Builds the stand-in, unless it is built; the folder that has it.
fn stand_in() -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("fake_cuda");
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fake_cuda/build");
    let status = Command::new(script).arg(&folder).status().expect("the build script runs");
    assert!(status.success(), "the stand-in for libcuda does not build; it needs a C++ compiler");
    folder
}
