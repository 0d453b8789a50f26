//! Finding `libnixl_capi.so` and checking it, before anything of NIXL is called.
#![allow(unsafe_code)]

use std::path::{Path, PathBuf};
use std::sync::Mutex;

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};

use super::NIXL_ENGINE_NAME;
use crate::transfer::TransferError;

/// The file that is looked for.
pub const NIXL_LIBRARY_NAME: &str = "libnixl_capi.so";

/// The version that the bindings were made for.
const NIXL_VERSION: &str = "1.5.1";

/// What this folder, and `nixl_sys` under it, calls. A symbol that is missing aborts the process when it is called.
const SYMBOLS: [&str; 39] = [
    "nixl_capi_agent_make_connection",
    "nixl_capi_check_remote_md",
    "nixl_capi_create_backend",
    "nixl_capi_create_configured_agent",
    "nixl_capi_create_opt_args",
    "nixl_capi_create_reg_dlist",
    "nixl_capi_create_xfer_dlist",
    "nixl_capi_create_xfer_req",
    "nixl_capi_deregister_mem",
    "nixl_capi_destroy_agent",
    "nixl_capi_destroy_backend",
    "nixl_capi_destroy_mem_list",
    "nixl_capi_destroy_opt_args",
    "nixl_capi_destroy_params",
    "nixl_capi_destroy_reg_dlist",
    "nixl_capi_destroy_string_list",
    "nixl_capi_destroy_xfer_dlist",
    "nixl_capi_destroy_xfer_req",
    "nixl_capi_get_available_plugins",
    "nixl_capi_get_local_md",
    "nixl_capi_get_plugin_params",
    "nixl_capi_get_xfer_status",
    "nixl_capi_invalidate_remote_md",
    "nixl_capi_load_remote_md",
    "nixl_capi_make_xfer_req",
    "nixl_capi_opt_args_add_backend",
    "nixl_capi_opt_args_set_skip_desc_merge",
    "nixl_capi_post_xfer_req",
    "nixl_capi_prep_xfer_dlist",
    "nixl_capi_reg_dlist_add_desc",
    "nixl_capi_reg_dlist_clear",
    "nixl_capi_register_mem",
    "nixl_capi_release_xfer_dlist_handle",
    "nixl_capi_release_xfer_req",
    "nixl_capi_string_list_get",
    "nixl_capi_string_list_size",
    "nixl_capi_xfer_dlist_add_desc",
    "nixl_capi_xfer_dlist_clear",
    "nixl_capi_is_stub",
];

/// The library once it is loaded; never closed, since NIXL's threads and destructors live in it.
static LOADED: Mutex<Option<LoadedLibrary>> = Mutex::new(None);

#[derive(Debug)]
struct LoadedLibrary {
    path: PathBuf,
    _library: Library,
}

/// Loads the library if it is not loaded yet, and says from where: of the folders in `lib_dirs`, each either holding the
/// library or the unpacked Python wheel. Without any, of `NIXL_LIB_DIR`, likewise, or of what the system searches
/// (`LD_LIBRARY_PATH`, its own folders).
///
/// # Errors
/// [`TransferError::Unavailable`] with every place that was tried, when there is none, or none that has what
/// version 1.5.1 has.
pub fn load_library(lib_dirs: &[PathBuf]) -> Result<PathBuf, TransferError> {
    // Nothing panics while it is locked; if it did, what is stored would still be true.
    let mut loaded = LOADED.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    if let Some(loaded) = &*loaded {
        return Ok(loaded.path.clone());
    }
    let candidates = candidates(lib_dirs, std::env::var_os("NIXL_LIB_DIR").map(PathBuf::from));
    let found = load_first(&candidates)?;
    // Only now may the bindings be called. They look for the library by its name, and find the one that is loaded.
    if nixl_sys::is_stub() {
        return Err(unavailable(&format!(
            "{} is loaded but the bindings do not find it by the name {NIXL_LIBRARY_NAME}",
            found.path.display()
        )));
    }
    Ok(loaded.insert(found).path.clone())
}

fn unavailable(seen: &str) -> TransferError {
    TransferError::Unavailable {
        engine: NIXL_ENGINE_NAME,
        reason: format!(
            "{seen}; install NIXL {NIXL_VERSION} (pip install --no-deps nixl-cu12=={NIXL_VERSION}) and set NIXL_LIB_DIR \
             to the folder it went into, or use transfer_channel: local"
        ),
    }
}

fn candidates(lib_dirs: &[PathBuf], lib_dir: Option<PathBuf>) -> Vec<PathBuf> {
    if !lib_dirs.is_empty() {
        return lib_dirs.iter().flat_map(|folder| in_folder(folder)).collect();
    }
    let mut candidates: Vec<PathBuf> = lib_dir.iter().flat_map(|folder| in_folder(folder)).collect();
    candidates.push(PathBuf::from(NIXL_LIBRARY_NAME));
    candidates
}

/// The library in a folder, or in a wheel that was unpacked there. A relative path with a folder in it is looked up
/// from the working directory, as everywhere.
fn in_folder(folder: &Path) -> Vec<PathBuf> {
    let mut wheels: Vec<PathBuf> = std::fs::read_dir(folder)
        .into_iter()
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.to_string_lossy().ends_with(".mesonpy.libs"))
        .map(|path| path.join(NIXL_LIBRARY_NAME))
        .filter(|path| path.exists())
        .collect();
    wheels.sort();
    wheels.insert(0, folder.join(NIXL_LIBRARY_NAME));
    wheels
}

fn load_first(candidates: &[PathBuf]) -> Result<LoadedLibrary, TransferError> {
    let mut tried = Vec::new();
    for path in candidates {
        match load(path) {
            Ok(loaded) => return Ok(loaded),
            Err(reason) => tried.push(reason),
        }
    }
    Err(unavailable(&format!("no usable NIXL library; tried {}", tried.join(", "))))
}

fn load(path: &Path) -> Result<LoadedLibrary, String> {
    let shown = path.display();
    if path.components().count() > 1 && !path.exists() {
        return Err(format!("{shown} (not there)"));
    }
    // SAFETY: runs the library's initialisers, which have no preconditions; whoever may set the folders may choose
    // what this process runs. Global, so that NIXL's plugins find its symbols.
    let library = unsafe { Library::open(Some(path), RTLD_NOW | RTLD_GLOBAL) };
    let library = library.map_err(|error| format!("{shown} ({error})"))?;
    for symbol in SYMBOLS {
        // SAFETY: the symbol is looked up and never called through this type.
        let found = unsafe { library.get::<*const ()>(symbol.as_bytes()) };
        if found.is_err() {
            return Err(format!("{shown} (it lacks {symbol}, so it is not NIXL {NIXL_VERSION})"));
        }
    }
    Ok(LoadedLibrary { path: path.to_owned(), _library: library })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_library_is_an_error_that_lists_every_place_and_the_cure() {
        // Broken in production: the process aborts at the first NIXL call on a machine without NIXL.
        let folder = tempfile::tempdir().unwrap();
        let wheel = folder.path().join(".nixl_cu12.mesonpy.libs");
        std::fs::create_dir(&wheel).unwrap();
        std::fs::write(wheel.join(NIXL_LIBRARY_NAME), "not a library").unwrap();
        let other = candidates(&[], Some(folder.path().to_owned()));
        assert_eq!(other.last(), Some(&PathBuf::from(NIXL_LIBRARY_NAME)));
        // Whoever names folders means these: a NIXL that is somewhere else is another one.
        let named = [PathBuf::from("/nowhere"), folder.path().to_owned()];
        let places = candidates(&named, Some(PathBuf::from("/elsewhere")));
        assert!(
            !places.contains(&PathBuf::from(NIXL_LIBRARY_NAME))
                && !places.iter().any(|at| at.starts_with("/elsewhere"))
        );
        let text = load_first(&places).unwrap_err().to_string();
        assert!(text.contains("/nowhere/libnixl_capi.so (not there)"), "{text}");
        assert!(text.contains(&format!("{}/libnixl_capi.so (not there)", folder.path().display())), "{text}");
        assert!(text.contains(".nixl_cu12.mesonpy.libs/libnixl_capi.so ("), "{text}");
        assert!(text.contains("NIXL_LIB_DIR") && text.contains("transfer_channel: local"), "{text}");
    }

    #[test]
    fn a_library_of_another_version_is_refused_before_it_is_called() {
        // Broken in production: a symbol that an older NIXL lacks aborts the daemon in the middle of a request.
        let other = "libm.so.6";
        let text = load_first(&[PathBuf::from(other)]).unwrap_err().to_string();
        assert!(text.contains("libm.so.6 (it lacks nixl_capi_agent_make_connection"), "{text}");
    }
}
