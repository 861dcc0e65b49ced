//! Store URLs: what a user may write, and what it means.
//!
//! A store is named by a URL of a known scheme or by a plain path, which is taken relative to a given folder (that of
//! the job file) and made an absolute `file://` URL. Nothing here does I/O.

use std::path::{Component, Path, PathBuf};

use url::Url;

use crate::error::StoreError;

/// The schemes a store URL may have, for messages.
pub const SCHEMES: [&str; 5] = ["file", "s3", "gs", "az", "memory"];

/// Where a store is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Place {
    /// A folder on a local or shared disk.
    Folder(PathBuf),
    /// This process's memory.
    Memory,
    /// A bucket or container: scheme, the whole URL, and the prefix within the bucket.
    Bucket(&'static str, Url, String),
}

/// Makes a store's name a URL. Text without `://` is a path, relative to `base_dir`; a URL of a known scheme is
/// returned as it is, without a trailing slash.
pub fn normalize_url(text: &str, base_dir: &Path) -> Result<String, StoreError> {
    if text.trim().is_empty() {
        return Err(StoreError::Input(
            "the store's URL is empty; give a folder or a URL such as s3://bucket/path".into(),
        ));
    }
    if let Some((scheme, rest)) = text.split_once("://") {
        let normal = match (parse(text)?, rest.trim_end_matches('/')) {
            // The root of the disk keeps its slash.
            (Place::Folder(_), "") => format!("{scheme}:///"),
            (_, rest) => format!("{scheme}://{rest}"),
        };
        // What was before the last slash is the end now, where the rules are stricter.
        parse(&normal)?;
        return Ok(normal);
    }
    if text.contains('\0') {
        return Err(StoreError::Input(format!("the store's path {text:?} has a zero byte in it")));
    }
    let path = base_dir.join(text);
    let absolute = std::path::absolute(&path)
        .map_err(|e| StoreError::Input(format!("the store's path {text:?} cannot be made absolute: {e}")))?;
    let url = Url::from_file_path(lexically_clean(&absolute))
        .map_err(|()| StoreError::Input(format!("the store's path {text:?} is not a usable path")))?;
    let text = url.as_str().trim_end_matches('/');
    Ok(if text == "file:" { "file:///".to_owned() } else { text.to_owned() })
}

/// Removes `.` and `..` by their text, so that one folder has one URL.
fn lexically_clean(path: &Path) -> PathBuf {
    let mut clean = PathBuf::new();
    for part in path.components() {
        match part {
            Component::CurDir => {}
            Component::ParentDir => {
                clean.pop();
            }
            other => clean.push(other),
        }
    }
    clean
}

/// Reads a store URL.
pub(crate) fn parse(text: &str) -> Result<Place, StoreError> {
    let bad = |why: String| StoreError::Input(format!("store URL {text:?}: {why}"));
    // A URL parser drops them or not, depending on where they stand.
    if text.trim() != text || text.contains(char::is_control) {
        return Err(bad("has spaces around it or control characters in it".into()));
    }
    let url = Url::parse(text)
        .map_err(|e| bad(format!("{e}; expected for example file:///data/cairn or s3://bucket/path")))?;
    if url.query().is_some() || url.fragment().is_some() || !url.username().is_empty() || url.password().is_some() {
        return Err(bad("a store URL has no user, query or fragment; credentials come from the environment".into()));
    }
    let scheme = match url.scheme() {
        "file" => {
            let path = url.to_file_path().map_err(|()| {
                bad("a file URL has three slashes and an absolute path, as in file:///data/cairn".into())
            })?;
            if path.as_os_str().as_encoded_bytes().contains(&0) {
                return Err(bad("no path has a zero byte in it".into()));
            }
            return Ok(Place::Folder(path));
        }
        "memory" => return Ok(Place::Memory),
        "s3" => "s3",
        "gs" => "gs",
        "az" => "az",
        other => return Err(bad(unknown_scheme(other))),
    };
    if url.host_str().is_none_or(str::is_empty) {
        return Err(bad(format!("names no bucket; expected {scheme}://bucket/path")));
    }
    let prefix = url.path().trim_matches('/').to_owned();
    if prefix.split('/').any(|s| s == "..") {
        return Err(bad("the path must not contain '..'".into()));
    }
    Ok(Place::Bucket(scheme, url, prefix))
}

fn unknown_scheme(scheme: &str) -> String {
    let known = "file, s3, gs, az (Azure)";
    let near = match scheme {
        "s3a" | "s3n" | "s3s" | "http" | "https" => Some("s3 (with AWS_ENDPOINT_URL for a server of your own)"),
        "gcs" | "gsutil" => Some("gs"),
        "azure" | "abfs" | "abfss" | "wasb" | "adl" => Some("az"),
        "fil" | "files" | "fle" | "path" | "nfs" => Some("file"),
        _ => SCHEMES.into_iter().find(|s| s.starts_with(scheme) || scheme.starts_with(s)),
    };
    match near {
        Some(near) => format!("unknown scheme {scheme:?}; did you mean {near}? Known: {known}"),
        None => format!("unknown scheme {scheme:?}; known: {known}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_become_urls() {
        let base = Path::new("/jobs/here");
        assert_eq!(normalize_url("./cairn-store", base).unwrap(), "file:///jobs/here/cairn-store");
        assert_eq!(normalize_url("../x y/", base).unwrap(), "file:///jobs/x%20y");
        assert_eq!(normalize_url("/abs", base).unwrap(), "file:///abs");
        assert_eq!(normalize_url("s3://bucket/a/", base).unwrap(), "s3://bucket/a");
        assert_eq!(parse("file:///jobs/x%20y").unwrap(), Place::Folder("/jobs/x y".into()));
    }

    #[test]
    fn a_normal_form_is_its_own_normal_form() {
        for (text, normal) in [
            ("memory://", "memory://"),
            ("file:///", "file:///"),
            ("file:////", "file:///"),
            ("/", "file:///"),
            ("s3://b//", "s3://b"),
        ] {
            assert_eq!(normalize_url(text, Path::new("/jobs")).unwrap(), normal);
            assert_eq!(normalize_url(normal, Path::new("/jobs")).unwrap(), normal);
        }
    }

    #[test]
    fn wrong_urls_say_what_would_be_right() {
        let message = |text: &str| normalize_url(text, Path::new("/")).unwrap_err().to_string();
        assert!(message("gcs://b/x").contains("did you mean gs?"));
        assert!(message("ftp://b/x").contains("known: file, s3, gs, az"));
        assert!(message("s3:///x").contains("s3://bucket/path"), "{}", message("s3:///x"));
        assert!(message("file://host/x").contains("three slashes"));
        assert!(message("s3://key:secret@b/x").contains("credentials come from the environment"));
        assert!(message("  ").contains("empty"));
    }
}
