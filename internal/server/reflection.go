package server

import (
	"fmt"

	"github.com/layer5io/meshery-adapter-library/meshes"
	"google.golang.org/grpc"
	"google.golang.org/grpc/reflection"
	reflectionpb "google.golang.org/grpc/reflection/grpc_reflection_v1"
	reflectionalphapb "google.golang.org/grpc/reflection/grpc_reflection_v1alpha"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/descriptorpb"

	"github.com/meshery/meshery-filters/internal/server/filterspb"
)

// registerReflection describes the services as they are served. The library's description of its service would hide the
// calls that were added to it.
func registerReflection(g *grpc.Server) {
	o := reflection.ServerOptions{Services: g, DescriptorResolver: newDescriptors()}
	reflectionpb.RegisterServerReflectionServer(g, reflection.NewServerV1(o))
	reflectionalphapb.RegisterServerReflectionServer(g, reflection.NewServer(o))
}

// descriptors are those of the program, where own ones win.
type descriptors struct{ own *protoregistry.Files }

func newDescriptors() descriptors {
	file := protodesc.ToFileDescriptorProto(meshes.File_meshops_proto)
	added := filterspb.File_internal_server_filterspb_compat_proto
	file.Dependency = append(file.Dependency, added.Path())
	for _, s := range file.Service {
		for _, name := range []string{"CreateMeshInstance", "Provision"} {
			prefix := "." + string(added.Package()) + "." + name
			s.Method = append(s.Method, &descriptorpb.MethodDescriptorProto{Name: &name,
				InputType: proto.String(prefix + "Request"), OutputType: proto.String(prefix + "Response")})
		}
	}
	d := descriptors{new(protoregistry.Files)}
	merged, err := protodesc.NewFile(file, protoregistry.GlobalFiles)
	if err == nil {
		err = d.own.RegisterFile(merged)
	}
	if err != nil { // only another version of the library gets in here
		panic(fmt.Sprintf("server: describe %s: %v", meshServiceName, err))
	}
	return d
}

func (d descriptors) FindFileByPath(path string) (protoreflect.FileDescriptor, error) {
	if f, err := d.own.FindFileByPath(path); err == nil {
		return f, nil
	}
	return protoregistry.GlobalFiles.FindFileByPath(path)
}

func (d descriptors) FindDescriptorByName(name protoreflect.FullName) (protoreflect.Descriptor, error) {
	if f, err := d.own.FindDescriptorByName(name); err == nil {
		return f, nil
	}
	return protoregistry.GlobalFiles.FindDescriptorByName(name)
}
