package operation_test

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/meshery/meshery-filters/internal/operation"
)

func TestTheReadmesTableIsTheCatalogue(t *testing.T) {
	categories := map[operation.Category]string{operation.Install: "INSTALL", operation.SampleApplication: "SAMPLE_APPLICATION",
		operation.Configure: "CONFIGURE", operation.Validate: "VALIDATE", operation.Custom: "CUSTOM"}
	want := "| key | category | body | what deletion does |\n|---|---|---|---|\n"
	for _, row := range newRig(t).runner.Catalogue() {
		want += fmt.Sprintf("| `%s` | %s | %s | %s |\n", row.Key, categories[row.Category], row.Body, row.Deletion)
	}
	readme, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(readme), want+"\n") {
		t.Errorf("README.md does not hold the catalogue; it should say:\n%s", want)
	}
}

func TestNoDescriptionBecomesASwitchInMesherysPages(t *testing.T) {
	for _, row := range newRig(t).runner.Catalogue() {
		if strings.HasPrefix(row.Description, "Add-on:") || row.Description == "" {
			t.Errorf("%s: %q", row.Key, row.Description)
		}
	}
}
