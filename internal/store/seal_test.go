package store

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/meshery/meshery-filters/internal/problem"
)

func TestASealOpensWithItsKeyForItsLabelOnly(t *testing.T) {
	seal, err := NewSeal("sixteen bytes or")
	if err != nil {
		t.Fatal(err)
	}
	other, err := NewSeal("another sixteen bytes")
	if err != nil {
		t.Fatal(err)
	}
	text := []byte("a kubeconfig")
	sealed := seal.Close(text, "op-1")
	if bytes.Contains(sealed, text) || bytes.Equal(sealed, seal.Close(text, "op-1")) {
		t.Error("it is not hidden, or the same each time")
	}
	if got, err := seal.Open(sealed, "op-1"); !bytes.Equal(got, text) || err != nil {
		t.Errorf("%q, %v", got, err)
	}
	damaged := bytes.Clone(sealed)
	damaged[len(damaged)-1] ^= 1
	for name, open := range map[string]func() ([]byte, error){
		"another key":   func() ([]byte, error) { return other.Open(sealed, "op-1") },
		"another label": func() ([]byte, error) { return seal.Open(sealed, "op-2") },
		"damaged":       func() ([]byte, error) { return seal.Open(damaged, "op-1") },
		"nothing":       func() ([]byte, error) { return seal.Open(nil, "op-1") },
	} {
		if _, err := open(); !errors.Is(err, problem.Sealed) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := NewSeal("too short"); !errors.Is(err, problem.InvalidConfiguration) {
		t.Errorf("a short key: %v", err)
	}
}

func TestTheKeyThatIsMadeUpStays(t *testing.T) {
	path := t.TempDir()
	s := openStore(t, path)
	first, err := s.SealKey()
	if err != nil || len(first) != 64 {
		t.Fatal(first, err)
	}
	s.Close()
	s = openStore(t, path)
	if again, err := s.SealKey(); again != first || err != nil {
		t.Errorf("%q became %q, %v", first, again, err)
	}
	if err := os.WriteFile(filepath.Join(path, sealName), []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err = s.SealKey()
	refused(t, err, sealName, "delete it")
}
