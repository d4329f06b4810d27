//! Which request paths are protected.
//!
//! Proxies and upstreams disagree on what a path means: some decode %70, merge slashes,
//! resolve dots, take \ for /, ignore case or cut at ;. A prefix therefore matches when any
//! of these readings falls under it. The cost of a wrong match is one counted request; the
//! cost of a missed one is a way around the limit.

/// How often %XX is decoded at most; each round is one more reading.
const ROUNDS: usize = 3;

/// A path prefix that matches whole segments.
#[derive(Debug, PartialEq)]
pub struct Prefix {
    segments: Vec<Vec<u8>>,
}

impl Default for Prefix {
    /// Image Hub's pulls.
    fn default() -> Prefix {
        Prefix { segments: vec![b"pull".to_vec()] }
    }
}

impl Prefix {
    /// A prefix from its configured form, such as "/v1/pull"; None if it is no plain path.
    pub fn parse(text: &str) -> Option<Prefix> {
        let path = text.strip_prefix('/')?;
        if path.is_empty() {
            return Some(Prefix { segments: Vec::new() });
        }
        let path = path.strip_suffix('/').unwrap_or(path);
        let odd = |b: u8| !(b'!'..=b'~').contains(&b) || b"?#%;\\".contains(&b);
        let mut segments = Vec::new();
        for segment in path.split('/') {
            if segment.is_empty() || segment == "." || segment == ".." || segment.bytes().any(odd) {
                return None;
            }
            segments.push(segment.as_bytes().to_vec());
        }
        Some(Prefix { segments })
    }

    fn starts(&self, path: &[&[u8]]) -> bool {
        self.segments.len() <= path.len()
            && self.segments.iter().zip(path).all(|(a, b)| a.eq_ignore_ascii_case(b))
    }
}

/// Whether any reading of a request's `:path` falls under one of the prefixes.
pub fn protected(prefixes: &[Prefix], path: &[u8]) -> bool {
    let end = path.iter().position(|b| matches!(b, b'?' | b'#')).unwrap_or(path.len());
    let path = without_authority(path.get(..end).unwrap_or_default());
    if reading(prefixes, path) {
        return true;
    }
    let mut path = path.to_vec();
    for _ in 0..ROUNDS {
        match decode(&path) {
            Some(decoded) => path = decoded,
            None => return false,
        }
        if reading(prefixes, &path) {
            return true;
        }
    }
    false
}

/// The path of an absolute URL; a path is left as it is.
fn without_authority(path: &[u8]) -> &[u8] {
    if path.first() == Some(&b'/') {
        return path;
    }
    let Some(scheme) = path.windows(3).position(|w| w == b"://") else { return path };
    let rest = path.get(scheme + 3..).unwrap_or_default();
    let slash = rest.iter().position(|b| *b == b'/').unwrap_or(rest.len());
    rest.get(slash..).unwrap_or_default()
}

/// Walks one reading segment by segment. Every step is compared, so both /a/../pull and
/// /pull/../a fall under /pull.
fn reading(prefixes: &[Prefix], path: &[u8]) -> bool {
    let mut walked: Vec<&[u8]> = Vec::new();
    let matches = |walked: &[&[u8]]| prefixes.iter().any(|p| p.starts(walked));
    if matches(&walked) {
        return true;
    }
    for segment in path.split(|b| matches!(b, b'/' | b'\\')) {
        let end = segment.iter().position(|b| matches!(b, b';' | b'?' | b'#' | 0));
        match segment.get(..end.unwrap_or(segment.len())).unwrap_or_default() {
            b"" | b"." => {}
            b".." => {
                walked.pop();
            }
            name => walked.push(name),
        }
        if matches(&walked) {
            return true;
        }
    }
    false
}

/// The path with each %XX decoded once; None if there is none.
fn decode(path: &[u8]) -> Option<Vec<u8>> {
    let digit = |b: Option<&u8>| b.and_then(|b| char::from(*b).to_digit(16));
    let mut out = Vec::with_capacity(path.len());
    let mut at = 0;
    let mut found = false;
    while let Some(byte) = path.get(at) {
        if *byte == b'%' {
            if let (Some(high), Some(low)) = (digit(path.get(at + 1)), digit(path.get(at + 2))) {
                out.push((high << 4 | low) as u8);
                found = true;
                at += 3;
                continue;
            }
        }
        out.push(*byte);
        at += 1;
    }
    found.then_some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn under(prefix: &str, path: &str) -> bool {
        protected(&[Prefix::parse(prefix).expect("a plain path")], path.as_bytes())
    }

    #[test]
    fn whole_segments_match() {
        for path in ["/pull", "/pull/", "/pull?x", "/pull#x", "/pull/x", "/pull/x/y?z=/a", "/PULL"]
        {
            assert!(under("/pull", path), "{path} is under /pull");
        }
        for path in ["/", "", "*", "/pullother", "/pul", "/a/pull", "/auth?x=/pull", "/x#/pull"] {
            assert!(!under("/pull", path), "{path} is not under /pull");
        }
        assert!(under("/v1/pull/", "/v1/pull") && !under("/v1/pull", "/v1"));
        assert!(under("/", "/anything") && under("/", "*"));
    }

    #[test]
    fn no_spelling_gets_around() {
        for path in [
            "//pull",
            "/./pull",
            "/a/../pull",
            "/../pull",
            "/pull/../a",
            "/%70ull",
            "/%2570ull",
            "/%252570ull",
            "/%2fpull",
            "/a%2f..%2fpull",
            "/a/%2e%2e/pull",
            "\\pull",
            "/a\\..\\pull",
            "/%5cpull",
            "/pull;v=1",
            "/pull%3bv",
            "/pull%3Fx",
            "/pull%00",
            "/;x/pull",
            "/./%70%75%6c%6C",
            "http://host/pull",
            "http://host//pull",
            "/%zz/../pull",
        ] {
            assert!(under("/pull", path), "{path} is under /pull");
        }
    }

    #[test]
    fn prefixes_are_plain_paths() {
        for text in [
            "", "pull", "//", "/a//b", "/.", "/a/..", "/a?b", "/a b", "/ä", "/a%20", "/a;b",
            "/a\\b",
        ] {
            assert_eq!(Prefix::parse(text), None, "{text}");
        }
    }
}
