// Command kubernetes is etcd, the Kubernetes API server and its controller manager in one program: what it is called as
// says which of them it is, and so does its first argument. Tests run it; nothing that is shipped contains it.
package main

import (
	"fmt"
	"os"
	"path/filepath"
	_ "time/tzdata" // the controller manager reads time zones

	"github.com/spf13/cobra"
	"go.etcd.io/etcd/server/v3/etcdmain"
	"k8s.io/component-base/cli"
	_ "k8s.io/component-base/logs/json/register"          // the log format that flags may name
	_ "k8s.io/component-base/metrics/prometheus/clientgo" // the metrics of the client
	_ "k8s.io/component-base/metrics/prometheus/version"  // the metric that tells the version
	apiserver "k8s.io/kubernetes/cmd/kube-apiserver/app"
	manager "k8s.io/kubernetes/cmd/kube-controller-manager/app"
)

// parts are the commands of Kubernetes; etcd is none of them, since it parses its own arguments.
var parts = map[string]func() *cobra.Command{
	"kube-apiserver":          apiserver.NewAPIServerCommand,
	"kube-controller-manager": manager.NewControllerManagerCommand,
}

func main() {
	args := append([]string{filepath.Base(os.Args[0])}, os.Args[1:]...)
	if parts[args[0]] == nil && args[0] != "etcd" && len(args) > 1 {
		args = args[1:]
	}
	os.Args = args
	if args[0] == "etcd" {
		etcdmain.Main(args)
		return
	}
	newCommand, ok := parts[args[0]]
	if !ok {
		fmt.Fprintf(os.Stderr, "%q is none of etcd, kube-apiserver, kube-controller-manager\n", args[0])
		os.Exit(2)
	}
	os.Exit(cli.Run(newCommand()))
}
