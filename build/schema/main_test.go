package main

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"
)

func TestTheCommittedSchemasAreWhatTheTypesSay(t *testing.T) {
	root := filepath.Join("..", "..")
	for output, make := range outputs {
		want, err := make(root)
		if err != nil {
			t.Fatal(err)
		}
		got, err := os.ReadFile(filepath.Join(root, output))
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, want) {
			t.Errorf("%s is not what the types say; run `go run ./build/schema` in the repository's root", output)
		}
	}
}
