package store

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"

	"github.com/meshery/meshery-filters/internal/problem"
)

// Seal hides what is kept from whoever reads the disk or the store and has not got the key: AES-256-GCM.
type Seal struct{ aead cipher.AEAD }

// minSealKey is the least that a key's text may have, in bytes.
const minSealKey = 16

// NewSeal makes a Seal of a secret text. problem.InvalidConfiguration when that is shorter than 16 bytes.
func NewSeal(secret string) (*Seal, error) {
	if len(secret) < minSealKey {
		return nil, problem.InvalidConfiguration.WithFields("", []problem.Field{{Path: "sealKey", Cause: "the secret is shorter than 16 bytes",
			Remedy: "make one with `openssl rand -hex 32`"}})
	}
	key, err := hkdf.Key(sha256.New, []byte(secret), nil, "meshery-filters seal v1", 32)
	if err != nil {
		return nil, problem.Internal.New("derive the seal's key: %w", err)
	}
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, problem.Internal.New("make the seal: %w", err)
	}
	aead, err := cipher.NewGCMWithRandomNonce(block)
	if err != nil {
		return nil, problem.Internal.New("make the seal: %w", err)
	}
	return &Seal{aead}, nil
}

// Close seals the text for what label names: it opens for nothing else.
func (s *Seal) Close(text []byte, label string) []byte {
	return s.aead.Seal(nil, nil, text, []byte(label))
}

// Open gives the text back. problem.Sealed when it was sealed with another key or for something else, or is damaged.
func (s *Seal) Open(sealed []byte, label string) ([]byte, error) {
	text, err := s.aead.Open(nil, nil, sealed, []byte(label))
	if err != nil {
		return nil, problem.Sealed.New("%s: %w", label, err)
	}
	return text, nil
}

// SealKey is a key that is made up once and kept in the state directory, beside what it seals. It protects copies of an
// external store, and not those of the directory.
func (s *Store) SealKey() (string, error) {
	s.dir.making.Lock()
	defer s.dir.making.Unlock()
	data, err := s.dir.read(sealName, 128)
	if err != nil {
		return "", err
	}
	if data == nil {
		var key [32]byte
		rand.Read(key[:]) // never fails
		data = []byte(checked(hex.EncodeToString(key[:])))
		if err := s.dir.write(sealName, data); err != nil {
			return "", err
		}
	}
	text, whole := unchecked(string(data))
	if _, err := hex.DecodeString(text); err != nil || len(text) != 64 || !whole {
		return "", s.dir.damaged(sealName, "it does not hold a key", "delete it to get a new one, which cannot open what waits in the queue")
	}
	return text, nil
}
