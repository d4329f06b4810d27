package imagehub

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/golang-jwt/jwt/v5"
)

// claims are what a token says, under the names that the rate-limit filter reads: sub, plan, iat, exp.
type claims struct {
	Plan string `json:"plan"`
	jwt.RegisteredClaims
}

// unsignedToken is what the public images' tokens say.
type unsignedToken struct {
	Plan     string `json:"plan"`
	Username string `json:"username"`
}

// tokens issues and verifies tokens.
type tokens struct {
	key      []byte
	ttl      time.Duration
	unsigned bool
	now      func() time.Time
}

func (t *tokens) issue(name, plan string) (string, error) {
	if t.unsigned {
		body, err := json.Marshal(unsignedToken{Plan: plan, Username: name})
		if err != nil {
			return "", fmt.Errorf("encode the token: %w", err)
		}
		return base64.RawStdEncoding.EncodeToString(body), nil
	}
	now := t.now()
	token, err := jwt.NewWithClaims(jwt.SigningMethodHS256, claims{
		Plan: plan,
		RegisteredClaims: jwt.RegisteredClaims{
			Subject:   name,
			IssuedAt:  jwt.NewNumericDate(now),
			ExpiresAt: jwt.NewNumericDate(now.Add(t.ttl)),
		},
	}).SignedString(t.key)
	if err != nil {
		return "", fmt.Errorf("sign the token: %w", err)
	}
	return token, nil
}

// user returns the name that the token was issued for. Errors are fit to be shown: they never hold the token.
func (t *tokens) user(token string) (string, error) {
	if t.unsigned {
		// The public images' encoders differ in whether they pad.
		body, err := base64.RawStdEncoding.DecodeString(strings.TrimRight(token, "="))
		if err != nil {
			return "", errors.New("is not base64")
		}
		var said unsignedToken
		if err := json.Unmarshal(body, &said); err != nil || said.Username == "" {
			return "", errors.New("is not the base64 of a JSON object with a username")
		}
		return said.Username, nil
	}
	var said claims
	_, err := jwt.ParseWithClaims(token, &said, func(*jwt.Token) (any, error) { return t.key, nil },
		jwt.WithValidMethods([]string{jwt.SigningMethodHS256.Alg()}),
		jwt.WithExpirationRequired(),
		jwt.WithTimeFunc(t.now))
	switch {
	case errors.Is(err, jwt.ErrTokenMalformed):
		return "", errors.New("is not a signed token (JWT)")
	case errors.Is(err, jwt.ErrTokenSignatureInvalid), errors.Is(err, jwt.ErrTokenUnverifiable):
		return "", errors.New("has not been signed by this Image Hub with HS256")
	case errors.Is(err, jwt.ErrTokenExpired):
		return "", errors.New("has expired")
	case err != nil:
		return "", errors.New("has claims that do not hold")
	case said.Subject == "":
		return "", errors.New("names no user")
	}
	return said.Subject, nil
}

// bearer returns the token in an Authorization header: after "Bearer", or bare as the public page sends it.
func bearer(header string) string {
	header = strings.TrimSpace(header)
	if scheme, token, ok := strings.Cut(header, " "); ok && strings.EqualFold(scheme, "Bearer") {
		return strings.TrimSpace(token)
	}
	if strings.EqualFold(header, "Bearer") {
		return ""
	}
	return header
}
