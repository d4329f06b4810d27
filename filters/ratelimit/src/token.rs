//! Who a request comes from, as its token says.

use crate::config::{Auth, Config};
use hmac::{Hmac, Mac};
use json::{Number, Value};
use sha2::{Digest, Sha256};

/// Longest token looked at, in bytes.
const MAX_TOKEN: usize = 4096;
/// Longest user name, in bytes.
const MAX_USER: usize = 256;
const SECOND: u64 = 1_000_000_000;

/// What a believed token grants.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Grant {
    /// A hash of the user's name, different in every proxy.
    pub user: u128,
    /// Requests a minute; None: the plan is not a known one.
    pub limit: Option<u32>,
    /// From when on the token is no longer valid, in nanoseconds since 1970.
    pub expires: u64,
}

/// Why a token is not believed, in words for the client.
pub type Fault = &'static str;

/// The fault of a request that has no token at all.
pub const MISSING: Fault = "the token is missing";

/// Checks tokens. Its cost is paid once at configuration: the key's hash state is kept.
pub struct Verifier {
    key: Option<Hmac<Sha256>>,
    seed: [u8; 16],
}

impl Verifier {
    /// The seed keeps clients from choosing names that share a place of the table.
    pub fn new(config: &Config, seed: [u8; 16]) -> Verifier {
        let key = match &config.auth {
            // A key of any length is valid, so this is never None for a JWT.
            Auth::Jwt(key) => Hmac::new_from_slice(key).ok(),
            Auth::Unsigned => None,
        };
        Verifier { key, seed }
    }

    /// Reads the token in a header's value, with or without "Bearer " before it.
    pub fn verify(&self, config: &Config, header: &[u8], now: u64) -> Result<Grant, Fault> {
        let token = bare(header);
        if token.is_empty() {
            return Err(MISSING);
        }
        if token.len() > MAX_TOKEN {
            return Err("the token is too long");
        }
        let (claims, expires) = match &config.auth {
            Auth::Jwt(_) => self.jwt(token, now)?,
            Auth::Unsigned => (unsigned(token)?, u64::MAX),
        };
        let user = claims.get(&config.user_claim).and_then(Value::as_str).unwrap_or_default();
        if user.is_empty() || user.len() > MAX_USER {
            return Err("the token names no user");
        }
        let plan = claims.get(&config.plan_claim).and_then(Value::as_str).unwrap_or_default();
        Ok(Grant { user: self.hash(user), limit: config.limit(plan), expires })
    }

    fn hash(&self, user: &str) -> u128 {
        let digest: [u8; 32] =
            Sha256::new().chain_update(self.seed).chain_update(user).finalize().into();
        digest.first_chunk().map_or(0, |half| u128::from_le_bytes(*half))
    }

    fn jwt(&self, token: &[u8], now: u64) -> Result<(Value, u64), Fault> {
        const MALFORMED: Fault = "the token is not a JWT";
        let mut parts = token.split(|b| *b == b'.');
        let (Some(header), Some(payload), Some(signature), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(MALFORMED);
        };
        let head =
            base64(header, Alphabet::Url).and_then(|b| json::parse(&b).ok()).ok_or(MALFORMED)?;
        // No other algorithm, whatever the token asks for; "crit" asks for unknown checks.
        if head.get("alg").and_then(Value::as_str) != Some("HS256") || head.get("crit").is_some() {
            return Err("the token is not signed with HS256");
        }
        let signed = token.get(..header.len() + 1 + payload.len()).ok_or(MALFORMED)?;
        let signature = base64(signature, Alphabet::Url).ok_or(MALFORMED)?;
        let mac = self.key.clone().ok_or(MALFORMED)?.chain_update(signed);
        // Compares in constant time.
        mac.verify_slice(&signature).map_err(|_| "the token's signature is wrong")?;

        let claims =
            base64(payload, Alphabet::Url).and_then(|b| json::parse(&b).ok()).ok_or(MALFORMED)?;
        let expires = time(&claims, "exp")?.ok_or("the token has no expiry")?;
        if now >= expires {
            return Err("the token has expired");
        }
        if time(&claims, "nbf")?.is_some_and(|start| now < start) {
            return Err("the token is not valid yet");
        }
        Ok((claims, expires))
    }
}

/// The token without its scheme.
pub fn bare(header: &[u8]) -> &[u8] {
    let header = header.trim_ascii();
    match header.split_at_checked(7) {
        Some((scheme, rest)) if scheme.eq_ignore_ascii_case(b"bearer ") => rest.trim_ascii(),
        _ => header,
    }
}

/// A NumericDate claim in nanoseconds; fractions of a second are dropped.
fn time(claims: &Value, name: &str) -> Result<Option<u64>, Fault> {
    match claims.get(name) {
        None => Ok(None),
        Some(Value::Number(Number { integer: Some(seconds), .. })) => {
            Ok(Some(u64::try_from(*seconds).unwrap_or(0).saturating_mul(SECOND)))
        }
        Some(_) => Err("a time in the token is no plain number"),
    }
}

/// The token of the public Image Hub images: base64 of {"username": …, "plan": …}.
fn unsigned(token: &[u8]) -> Result<Value, Fault> {
    base64(token, Alphabet::Any)
        .and_then(|bytes| json::parse(&bytes).ok())
        .ok_or("the token is not base64 of JSON")
}

#[derive(Clone, Copy, PartialEq)]
enum Alphabet {
    /// URL-safe, unpadded, no stray bits: the one form a JWT may have.
    Url,
    /// Either alphabet, padded or not.
    Any,
}

fn base64(text: &[u8], alphabet: Alphabet) -> Option<Vec<u8>> {
    let mut text = text;
    if alphabet == Alphabet::Any {
        for _ in 0..2 {
            text = text.strip_suffix(b"=").unwrap_or(text);
        }
    }
    if text.len() % 4 == 1 {
        return None;
    }
    let mut out = Vec::with_capacity(text.len() / 4 * 3 + 2);
    let (mut bits, mut count) = (0u32, 0);
    for byte in text {
        let six = match byte {
            b'A'..=b'Z' => byte - b'A',
            b'a'..=b'z' => byte - b'a' + 26,
            b'0'..=b'9' => byte - b'0' + 52,
            b'-' => 62,
            b'_' => 63,
            b'+' if alphabet == Alphabet::Any => 62,
            b'/' if alphabet == Alphabet::Any => 63,
            _ => return None,
        };
        bits = bits << 6 | u32::from(six);
        count += 6;
        if count >= 8 {
            count -= 8;
            out.push((bits >> count) as u8);
            bits &= (1 << count) - 1;
        }
    }
    (alphabet == Alphabet::Any || bits == 0).then_some(out)
}

#[cfg(test)]
pub mod tests {
    use super::*;

    pub const KEY: &str = "0123456789abcdef0123456789abcdef";
    pub const NOW: u64 = 1_700_000_000;

    pub fn encode(bytes: &[u8]) -> String {
        const DIGITS: &[u8; 64] =
            b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
        let mut out = String::new();
        for chunk in bytes.chunks(3) {
            let word =
                chunk.iter().fold(0u32, |w, b| w << 8 | u32::from(*b)) << (8 * (3 - chunk.len()));
            for i in 0..=chunk.len() {
                out.push(char::from(DIGITS[(word >> (18 - 6 * i)) as usize & 63]));
            }
        }
        out
    }

    pub fn sign(key: &str, header: &str, claims: &str) -> String {
        let signed = format!("{}.{}", encode(header.as_bytes()), encode(claims.as_bytes()));
        let mac = Hmac::<Sha256>::new_from_slice(key.as_bytes())
            .expect("any length")
            .chain_update(&signed);
        format!("{signed}.{}", encode(&mac.finalize().into_bytes()))
    }

    fn verify(config: &str, header: &[u8]) -> Result<Grant, Fault> {
        let config = Config::parse(config.as_bytes()).expect("valid");
        Verifier::new(&config, [7; 16]).verify(&config, header, NOW * SECOND)
    }

    fn jwt(header: &str, claims: &str) -> Result<Grant, Fault> {
        let config = format!(r#"{{"auth":{{"mode":"jwt","key":"{KEY}"}}}}"#);
        verify(&config, format!("Bearer {}", sign(KEY, header, claims)).as_bytes())
    }

    const HS256: &str = r#"{"alg":"HS256","typ":"JWT"}"#;

    #[test]
    fn rfc_7515_example_a1_verifies() {
        // The key of the RFC is binary; only its parts are checked here.
        let key = base64(b"AyM1SysPpbyDfgZld3umj1qzKObwVMkoqQ-EstJQLr_T-1qS0gZH75aKtMN3Yj0iPS4hcgUuTwjAzZr1Z9CAow", Alphabet::Url);
        let mac = Hmac::<Sha256>::new_from_slice(&key.expect("base64")).expect("any length").chain_update(
            "eyJ0eXAiOiJKV1QiLA0KICJhbGciOiJIUzI1NiJ9.eyJpc3MiOiJqb2UiLA0KICJleHAiOjEzMDA4MTkzODAsDQogImh0dHA6Ly9leGFtcGxlLmNvbS9pc19yb290Ijp0cnVlfQ",
        );
        let signature =
            base64(b"dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk", Alphabet::Url).expect("base64");
        assert!(mac.verify_slice(&signature).is_ok());
    }

    #[test]
    fn a_signed_token_grants_its_plan_until_its_expiry() {
        let grant = jwt(HS256, r#"{"sub":"ann","plan":"Team","exp":1700000060}"#).expect("valid");
        assert_eq!(grant.limit, Some(100));
        assert_eq!(grant.expires, 1_700_000_060 * SECOND);
        let other = jwt(HS256, r#"{"sub":"bob","plan":"Gold","exp":1700000060.5}"#).expect("valid");
        assert_eq!(other.limit, None);
        assert_ne!(other.user, grant.user);
    }

    #[test]
    fn bad_jwts_are_refused() {
        let good = r#"{"sub":"ann","plan":"Team","exp":1700000060}"#;
        let cases = [
            (r#"{"alg":"none"}"#, good, "HS256"),
            (r#"{"alg":"hs256"}"#, good, "HS256"),
            (r#"{"alg":"HS512"}"#, good, "HS256"),
            (r#"{"alg":"HS256","crit":["x"]}"#, good, "HS256"),
            (r#"{"alg":"none","alg":"HS256"}"#, good, "not a JWT"),
            (r#"[]"#, good, "HS256"),
            ("HS256", good, "not a JWT"),
            (HS256, "{", "not a JWT"),
            (HS256, r#"{"sub":"ann","plan":"Team"}"#, "no expiry"),
            (HS256, r#"{"sub":"ann","plan":"Team","exp":1700000000}"#, "expired"),
            (HS256, r#"{"sub":"ann","plan":"Team","exp":-1}"#, "expired"),
            (HS256, r#"{"sub":"ann","plan":"Team","exp":"1700000060"}"#, "no plain number"),
            (HS256, r#"{"sub":"ann","plan":"Team","exp":1e99}"#, "no plain number"),
            (HS256, r#"{"sub":"ann","exp":1700000060,"nbf":1700000001}"#, "not valid yet"),
            (HS256, r#"{"plan":"Team","exp":1700000060}"#, "no user"),
            (HS256, r#"{"sub":"","plan":"Team","exp":1700000060}"#, "no user"),
            (HS256, r#"{"sub":7,"plan":"Team","exp":1700000060}"#, "no user"),
        ];
        for (header, claims, want) in cases {
            match jwt(header, claims) {
                Err(fault) if fault.contains(want) => {}
                got => panic!("{header} {claims}: {got:?}, want {want}"),
            }
        }
    }

    #[test]
    fn every_changed_character_breaks_the_token() {
        let config = format!(r#"{{"auth":{{"mode":"jwt","key":"{KEY}"}}}}"#);
        let token = sign(KEY, HS256, r#"{"sub":"ann","plan":"Team","exp":1700000060}"#);
        assert!(verify(&config, token.as_bytes()).is_ok());
        for at in 0..token.len() {
            for change in [1u8, 2, 4, 0x20] {
                let mut bad = token.clone().into_bytes();
                bad[at] ^= change;
                assert!(verify(&config, &bad).is_err(), "byte {at} ^ {change}");
            }
            assert!(verify(&config, &token.as_bytes()[..at]).is_err(), "cut at {at}");
        }
        let other = sign(
            "another key of more than 32 bytes…",
            HS256,
            r#"{"sub":"ann","plan":"Team","exp":1700000060}"#,
        );
        assert_eq!(verify(&config, other.as_bytes()), Err("the token's signature is wrong"));
        assert_eq!(verify(&config, format!("{token}.").as_bytes()), Err("the token is not a JWT"));
    }

    #[test]
    fn the_public_images_unsigned_tokens_are_read() {
        let config = r#"{"auth":{"mode":"unsigned"}}"#;
        // As atob and base64 -w0 write it: {"username":"ann","plan":"Personal"}
        let token = "eyJ1c2VybmFtZSI6ImFubiIsInBsYW4iOiJQZXJzb25hbCJ9";
        let grant = verify(config, token.as_bytes()).expect("valid");
        assert_eq!(grant.limit, Some(10));
        assert_eq!(verify(config, format!("bearer  {token}").as_bytes()), Ok(grant));
        assert_eq!(verify(config, b"eyJ1c2VybmFtZSI6Ij8_In0=").map(|g| g.limit), Ok(None));
        for bad in [
            "",
            "Bearer ",
            "Bearer",
            "====",
            "e30=",
            "bnVsbA==",
            "a",
            "{}",
            "eyJ1c2VybmFtZSI6ImFubiI,",
        ] {
            assert!(verify(config, bad.as_bytes()).is_err(), "{bad:?}");
        }
        assert_eq!(verify(config, &[b'A'; 5000]), Err("the token is too long"));
    }
}
